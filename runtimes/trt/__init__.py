"""TensorRT at run time, both flavours: the full one (``tensorrt``) and TensorRT for RTX (``tensorrt_rtx``).

trt = load("rtx")                     # the Python module, with what its wheel lacks mended
register_plugins(trt, kernels)        # before a graph is parsed or a plan is deserialised
"""

from runtimes.trt.binding import Flavour, load
from runtimes.trt.registry import register_plugins, take_failure

__all__ = ["Flavour", "load", "register_plugins", "take_failure"]
