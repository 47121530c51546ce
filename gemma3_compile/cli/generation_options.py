"""Options that ``run`` and ``chat`` share: where a bundle runs, how tokens are drawn, how pictures are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gemma3_compile.cli.choices import NearChoice
from runtimes.errors import UsageError
from runtimes.units import in_words

if TYPE_CHECKING:
    from pathlib import Path

    from runtimes.engine import Engine
    from runtimes.results import Generation, GenerationOptions, GenerationStats
    from runtimes.session import Provider

Command = TypeVar("Command", bound=Callable[..., Any])

PROVIDER = NearChoice(["auto", "cpu", "cuda"])

_HOST = (
    click.option("--provider", type=PROVIDER, default="auto", show_default=True, help="Where to run."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: the physical cores]"),
    click.option("--context", type=click.IntRange(1), help="Most tokens of prompt and answer. [default: the model's]"),
)
_SAMPLING = (
    click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Most tokens to write."),
    click.option(
        "--temperature", type=click.FloatRange(0), default=1.0, show_default=True, help="0 takes the likeliest token."
    ),
    click.option(
        "--top-k", type=click.IntRange(0), default=64, show_default=True, help="Draw from the k likeliest; 0: all."
    ),
    click.option(
        "--top-p", type=float, default=0.95, show_default=True, help="Draw from the likeliest that add up to p."
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="Draw from tokens p times as likely as the likeliest.",
    ),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: say less twice."),
    click.option("--seed", type=click.IntRange(0), help="Repeats the draws. [default: a new one, which --stats names]"),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given many times."),
)
_PICTURES = (
    click.option(
        "--pan-and-scan/--no-pan-and-scan",
        default=None,
        help="Also show crops of long pictures. [default: the bundle's]",
    ),
    click.option("--pan-and-scan-min-crop-size", type=click.IntRange(1), metavar="PIXELS", help="No crop is smaller."),
    click.option("--pan-and-scan-max-num-crops", type=click.IntRange(1), metavar="N", help="No more crops a picture."),
    click.option(
        "--pan-and-scan-min-ratio", type=float, metavar="RATIO", help="Crop where one side is so much longer."
    ),
)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What the shared options were set to."""

    provider: Provider
    threads: int | None
    context: int | None
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    pan_and_scan: bool | None
    pan_and_scan_min_crop_size: int | None
    pan_and_scan_max_num_crops: int | None
    pan_and_scan_min_ratio: float | None

    def options(self, *, logprobs: int | None = None) -> GenerationOptions:
        """As the runtime takes them; raises UsageError where one is out of its range."""
        from runtimes.results import GenerationOptions
        from runtimes.sampling import SamplingOptions

        sampling = SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
        return GenerationOptions(max_tokens=self.max_tokens, sampling=sampling, stop=self.stop, logprobs=logprobs)

    def load(self, bundle: Path) -> Engine:
        """The bundle as an engine, with the three thresholds of Pan & Scan in place."""
        import runtimes
        from gemma3_compile.cli.bars import Bars

        engine = runtimes.load(
            bundle, provider=self.provider, threads=self.threads, context=self.context, progress=Bars()
        )
        self._set_thresholds(engine)
        return engine

    def _set_thresholds(self, engine: Engine) -> None:
        given: dict[str, Any] = {
            "min_crop_size": self.pan_and_scan_min_crop_size,
            "max_num_crops": self.pan_and_scan_max_num_crops,
            "min_ratio_to_activate": self.pan_and_scan_min_ratio,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        if not changes and not self.pan_and_scan:
            return
        manifest = engine.session.manifest
        image = manifest.model.image
        if image is None:
            raise UsageError(f"Pan & Scan is for pictures, but this bundle ({manifest.model.name}) is for text only")
        facts = replace(image.pan_and_scan, **changes)
        model = replace(manifest.model, image=replace(image, pan_and_scan=facts))
        engine.session.manifest = replace(manifest, model=model)


def generation_options(function: Command) -> Command:
    """Adds the shared options; ``function`` gets them as one argument, ``settings``."""
    names = set(GenerationSettings.__dataclass_fields__)

    @wraps(function)
    def gathered(**values: Any) -> Any:
        settings = GenerationSettings(**{name: values.pop(name) for name in names})
        return function(settings=settings, **values)

    for option in reversed((*_HOST, *_SAMPLING, *_PICTURES)):
        gathered = option(gathered)
    return gathered  # type: ignore[return-value]  # `wraps` keeps what callers see


def stats_line(result: Generation) -> str:
    """Counts, rates and memory of one generation, in one line."""
    stats = result.stats
    parts = [f"prompt {stats.prompt_tokens} tokens"]
    if stats.cached_tokens:
        parts.append(f"{stats.cached_tokens} of them from the cache")
    if stats.images:
        parts.append(f"{stats.images} pictures in {stats.image_s:.2f} s")
    if stats.prefill_tokens_per_s is not None:
        parts.append(f"read at {stats.prefill_tokens_per_s:.1f} tok/s")
    parts.append(f"first token after {stats.first_token_s:.2f} s")
    parts.append(f"wrote {stats.new_tokens} tokens" + _rate(stats))
    parts.append(f"caches {in_words(stats.cache_bytes)}")
    if stats.peak_rss_bytes is not None:
        parts.append(f"peak memory {in_words(stats.peak_rss_bytes)}")
    parts.append(f"seed {result.seed}")
    return ", ".join(parts)


def result_json(result: Generation) -> dict[str, Any]:
    """A generation as ``--json`` prints it."""
    stats = result.stats
    rates = {"prefill_tokens_per_s": stats.prefill_tokens_per_s, "decode_tokens_per_s": stats.decode_tokens_per_s}
    data = asdict(result)
    data["stats"] = {**asdict(stats), **rates}
    return data


def _rate(stats: GenerationStats) -> str:
    return f" at {stats.decode_tokens_per_s:.1f} tok/s" if stats.decode_tokens_per_s is not None else ""
