"""Finding and importing TensorRT.

The wheel of TensorRT for RTX has ``libtensorrt_rtx.so.1`` only, but its parser opens ``libtensorrt_rtx.so`` beside it as
soon as a graph has a plugin, and ends the process where there is none. So both libraries are loaded beforehand from a
folder of links in which the name exists.
"""

from __future__ import annotations

import ctypes
import tempfile
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Literal

from runtimes.errors import HostError

Flavour = Literal["rtx", "full"]

MODULES: dict[Flavour, str] = {"rtx": "tensorrt_rtx", "full": "tensorrt"}
EXTRAS: dict[Flavour, str] = {"rtx": "trt-rtx", "full": "trt"}
ARCHITECTURES: dict[Flavour, tuple[int, ...]] = {
    "rtx": (80, 86, 89, 120, 121),
    "full": (80, 86, 89, 90, 100, 103, 120, 121),
}
"""What each flavour makes plans for. Full TensorRT builds for the GPU of its own host."""
_OLDEST: dict[Flavour, str] = {"rtx": "1.7", "full": "11.0"}
_LIBRARY, _PARSER = "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so.1"
_INSTALL = (
    "pip install 'gemma3-compile[trt-rtx]' for GPUs of sm_80, sm_86, sm_89, sm_120 and sm_121; "
    "pip install 'gemma3-compile[trt]' for sm_90 and sm_100"
)


def installed(flavour: Flavour) -> bool:
    """Whether the Python module is there; nothing is loaded."""
    return util.find_spec(MODULES[flavour]) is not None


def load(flavour: Flavour | None = None) -> ModuleType:
    """The module of a flavour; the same one at every call.

    Args:
        flavour: None takes the one that is installed, of two the one for RTX, which builds without a GPU.

    Raises:
        HostError: it is not installed, its libraries cannot be loaded, or it is too old.
    """
    if flavour is None:
        found = [each for each in MODULES if installed(each)]
        if not found:
            raise HostError("TensorRT is not installed, neither the full one nor TensorRT for RTX", hint=_INSTALL)
        flavour = found[0]
    return _load(flavour)


@cache
def _load(flavour: Flavour) -> ModuleType:
    name, install = MODULES[flavour], f"pip install 'gemma3-compile[{EXTRAS[flavour]}]'"
    if not installed(flavour):
        raise HostError(f"the package {name} is not installed", hint=install)
    try:
        if flavour == "rtx":
            _load_libraries()
        module = import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise HostError(
            f"{name} is installed, but cannot be imported: {error}", hint=f"install it again: {install}"
        ) from error
    preview = getattr(module, "PreviewFeature", None)
    if not (hasattr(module, "IPluginV3OneBuildV2") and hasattr(preview, "ALIASED_PLUGIN_IO_10_03")):
        version = getattr(module, "__version__", "of an unknown version")
        raise HostError(f"{name} {version} is too old: {_OLDEST[flavour]} or newer is needed", hint=f"{install} -U")
    return module


@cache
def _links() -> tempfile.TemporaryDirectory[str]:
    """A folder that lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="gemma3c-tensorrt-")


def _load_libraries() -> None:
    """Loads TensorRT for RTX from a folder in which its parser finds it. Does nothing where a library has all names."""
    spec = util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    versioned = sorted(folder.glob(f"{_LIBRARY}.[0-9]*"))
    if (folder / _LIBRARY).exists() or not versioned or not (folder / _PARSER).exists():
        return
    links = Path(_links().name)
    for name, target in ((_LIBRARY, versioned[0]), (versioned[0].name, versioned[0]), (_PARSER, folder / _PARSER)):
        if not (links / name).is_symlink():
            (links / name).symlink_to(target)
    for name in (versioned[0].name, _PARSER):
        ctypes.CDLL(str(links / name))
