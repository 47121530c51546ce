"""The configurations that both prefill attentions may take, which of them fit a GPU, and the inputs they share.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, C slots of a cache.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import triton
from torch import Tensor

from autotune.chosen import chosen_config
from autotune.draw import Draw
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Kernel, Space, Stage, Tensors
from autotune.kernels import prefill_hopper
from autotune.kernels.prefill_attention import check_prefill, visible_ends_BS
from autotune.launch import Launch

GARBAGE = 300.0
"""What inputs hold where nothing was written: it spoils every sum that it enters."""
_VALUES_OF_A_THREAD = 232
"""Registers that tiles may take of a thread's 255: the rest goes to addresses and loop state."""
_IMAGE_TOKENS = 256


class PrefillKernel(Kernel):
    """What is the same for both: which configurations there are, and which of them fit.

    ``BLOCK_M`` rows a tile, ``BLOCK_N`` keys a block, ``PACK`` heads in a tile; ``TMA`` 1 reads keys and values through
    tensor descriptors; ``MASK_ALL`` 1 masks every block in one loop. ``HOPPER`` 1 is the kernel of
    :mod:`autotune.kernels.prefill_hopper`, with as many ``PROGRAMS`` as the GPU has multiprocessors, or, at 0, one a tile.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16",)
    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)

    @abstractmethod
    def launch(self, config: Config, tensors: Tensors, scale: float) -> Launch:
        """The one launch over checked tensors."""

    def attend(self, tensors: Tensors, image_ids_BS: Tensor | None, scale: float, config: Config | None) -> Tensor:
        """Checks and launches; ``tensors`` are all that is read but the images. Without a configuration by the heuristic.

        Raises:
            UsageError: a shape, dtype or device that does not fit.
        """
        tensors |= {"out": torch.empty_like(tensors["q"])}
        if image_ids_BS is not None:
            tensors["visible_end"] = visible_ends_BS(image_ids_BS)
        check_prefill(tensors)
        self.launch(config or self._chosen(tensors), tensors, scale).run()
        return tensors["out"]

    def _chosen(self, tensors: Tensors) -> Config:
        """For the GPU that the tensors are on, or for an H100 in the interpreter."""
        q, k_cache = tensors["q"], tensors["k_cache"]
        batch, chunk, heads, head_dim = q.shape
        dims = {"batch": batch, "chunk": chunk, "start": 0, "heads": heads, "kv_heads": k_cache.shape[1]}
        dims |= {"head_dim": head_dim, "images": int("visible_end" in tensors), "ragged": 0}
        dims["window" if self.name == "window_prefill" else "slots"] = k_cache.shape[2]
        return chosen_config(self, Case(dtype="bfloat16", dims=dims), q.device)

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return (self.launch(config, tensors, case.dims["head_dim"] ** -0.5),)

    def bucket(self, case: Case) -> str:
        d = case.dims
        chunk = min(triton.next_power_of_2(d["batch"] * d["chunk"]), 8192)
        window = f" window={d['window']}" if "window" in d else ""
        images = "images" if d["images"] else "text"
        heads = f"heads={d['heads']}/{d['kv_heads']} head_dim={d['head_dim']}"
        return f"{case.dtype} tokens<={chunk} {heads}{window} {images}"

    def space(self, case: Case) -> Space:
        return Space(
            constants={
                "BLOCK_M": (32, 64, 128),
                "BLOCK_N": (16, 32, 64, 128),
                "PACK": (1, 2, 4),
                "TMA": (0, 1),
                "MASK_ALL": (0, 1),
                "HOPPER": (0, 1),
                "PROGRAMS": (0, 114, 132),
            },
            num_warps=(2, 4, 8),
            num_stages=(1, 2, 3, 4),
        )

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        c = config.constants
        if (case.dims["heads"] // case.dims["kv_heads"]) % c["PACK"]:
            return f"PACK={c['PACK']} heads do not divide a group of {case.dims['heads'] // case.dims['kv_heads']}"
        if c["HOPPER"]:
            return _hopper_refusal(case.dims["head_dim"], config, gpu)
        if c["PROGRAMS"]:
            return f"PROGRAMS={c['PROGRAMS']} is for the kernel for Hopper"
        return _plain_refusal(case.dims["head_dim"], config, gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        head_dim, group = case.dims["head_dim"], case.dims["heads"] // case.dims["kv_heads"]
        hopper = prefill_config(
            128, 64 if head_dim == 256 else 128, 2, warps=8, stages=2, tma=1, hopper=1, programs=gpu.multiprocessors
        )
        if self.refusal(case, hopper, gpu) is None:
            return hopper
        pack = 2 if group % 2 == 0 else 1
        if gpu.architecture in (90, 100, 103):
            return prefill_config(128, 64, pack, warps=8, stages=2, tma=1)
        return prefill_config(64, 32, pack, warps=4, stages=2)

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        shape = [case.dims[name] for name in ("batch", "chunk", "heads", "head_dim")]
        return {"out": torch.empty(shape, dtype=torch.bfloat16, device=device)}


def prefill_config(
    rows: int,
    keys: int,
    pack: int,
    *,
    warps: int,
    stages: int,
    tma: int = 0,
    mask_all: int = 0,
    hopper: int = 0,
    programs: int = 0,
) -> Config:
    """A point of the space that both prefill attentions share."""
    constants = {"BLOCK_M": rows, "BLOCK_N": keys, "PACK": pack, "TMA": tma, "MASK_ALL": mask_all}
    constants |= {"HOPPER": hopper, "PROGRAMS": programs}
    return Config(constants=constants, num_warps=warps, num_stages=stages)


def _hopper_refusal(head_dim: int, config: Config, gpu: Gpu) -> str | None:
    c, rows, keys = config.constants, 2 * prefill_hopper.QUERIES, config.constants["BLOCK_N"]
    if gpu.architecture != 90:
        return f"the kernel for Hopper needs compute capability 9.0, {gpu.name} has {gpu.architecture / 10}"
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon, in which the kernel for Hopper is written"
    if (c["BLOCK_M"], c["PACK"], c["TMA"], c["MASK_ALL"], config.num_warps) != (rows, 2, 1, 0, 8):
        return f"the kernel for Hopper is BLOCK_M={rows} PACK=2 TMA=1 MASK_ALL=0 warps=8"
    if c["PROGRAMS"] not in (0, gpu.multiprocessors):
        return f"PROGRAMS={c['PROGRAMS']}, but {gpu.name} has {gpu.multiprocessors} multiprocessors"
    if head_dim < 64 or keys < 32:
        return (
            f"the kernel for Hopper needs head_dim 64 or more and blocks of 32 keys or more, not {head_dim} and {keys}"
        )
    if head_dim // 2 + keys > 208:
        return f"sums of {head_dim} and scores of {keys} columns do not fit a consumer's registers"
    shared = prefill_hopper.shared_bytes(head_dim, keys, config.num_stages)
    return f"{shared} bytes of shared memory" if shared > gpu.shared_bytes else None


def _plain_refusal(head_dim: int, config: Config, gpu: Gpu) -> str | None:
    rows, keys, threads = config.constants["BLOCK_M"], config.constants["BLOCK_N"], 32 * config.num_warps
    queries_shared = gpu.architecture in (90, 100, 103)
    """Where matrix units read both operands from shared memory; elsewhere queries stay in registers."""
    if config.constants["TMA"] and gpu.architecture < 90:
        return f"tensor descriptors need compute capability 9.0, {gpu.name} has {gpu.architecture / 10}"
    if rows < 16 * config.num_warps:
        return f"{config.num_warps} warps need {16 * config.num_warps} rows, not {rows}"
    values = rows * head_dim + rows * keys * 3 // 2 + (0 if queries_shared else rows * head_dim // 2)
    if values > _VALUES_OF_A_THREAD * threads:
        return f"{rows} x {keys} scores and {rows} x {head_dim} sums take {values // threads} registers a thread"
    shared = 4 * config.num_stages * keys * head_dim + (
        2 * rows * head_dim + 1024 if queries_shared else 2 * rows * keys
    )
    if shared > gpu.shared_bytes:
        return f"{shared} bytes of shared memory, but {gpu.name} has {gpu.shared_bytes}"
    return None


def spoil_unwritten(tensors: Tensors, end_B: Tensor) -> None:
    """Fills the slots of both caches from ``end_B`` on with garbage; nothing on the meta device."""
    slot_C = torch.arange(tensors["k_cache"].shape[2], device=end_B.device)
    unwritten_BC = slot_C[None, :] >= end_B[:, None]
    for name in ("k_cache", "v_cache"):
        tensors[name].masked_fill_(unwritten_BC[:, None, :, None], GARBAGE)


def chunk_tensors(case: Case, *, slots: int, device: torch.device | str, seed: int) -> Tensors:
    """Queries, keys and values of a chunk, caches of C slots full of random rows, and where the chunk starts and ends.

    ``ragged`` 1: the sequences after the first start earlier and are shorter; the last of three or more is empty.
    """
    d = case.dims
    batch, chunk, heads, kv_heads, head_dim = (d[k] for k in ("batch", "chunk", "heads", "kv_heads", "head_dim"))
    shapes = {"q": (batch, chunk, heads, head_dim), "k_cache": (batch, kv_heads, slots, head_dim)}
    shapes |= {"k": (batch, chunk, kv_heads, head_dim), "v": (batch, chunk, kv_heads, head_dim)}
    shapes["v_cache"] = shapes["k_cache"]
    draw = Draw(device, seed)
    tensors = {name: draw.normal(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if draw.meta:
        tensors |= {name: torch.empty(batch, dtype=torch.int32, device=device) for name in ("start", "length")}
        if d["images"]:
            tensors["image_ids"] = torch.empty(batch, chunk, dtype=torch.int64, device=device)
            tensors["visible_end"] = torch.empty(batch, chunk, dtype=torch.int32, device=device)
        return tensors
    host = torch.Generator().manual_seed(seed)
    start = torch.full((batch,), d["start"], dtype=torch.int32)
    length = torch.full((batch,), chunk, dtype=torch.int32)
    if d["ragged"]:
        for sequence in range(1, batch):
            start[sequence] = torch.randint(d["start"] + 1, (), generator=host)
            length[sequence] = torch.randint(1, chunk + 1, (), generator=host)
        if batch > 2:
            length[-1] = 0
    tensors |= {"start": start.to(device), "length": length.to(device)}
    if d["images"]:
        tensors["image_ids"] = _images_BS(batch, chunk, d["images"], host).to(device)
        tensors["visible_end"] = visible_ends_BS(tensors["image_ids"])
    return tensors


def _images_BS(batch: int, chunk: int, images: int, generator: torch.Generator) -> Tensor:
    """One image in every equal part of the chunk, of 256 tokens or of half the part, at a random place."""
    part = chunk // min(images, chunk)
    tokens = max(min(_IMAGE_TOKENS, part // 2), 1)
    image_ids_BS = torch.full((batch, chunk), -1, dtype=torch.int64)
    for sequence in range(batch):
        for image in range(min(images, chunk)):
            first = image * part + int(torch.randint(part - tokens + 1, (), generator=generator))
            image_ids_BS[sequence, first : first + tokens] = image
    return image_ids_BS
