"""TensorRT's own network, computed in torch on a CPU: what a host can say of a plan that it cannot run.

    program = Program.read(parse(trt, Path("decoder.onnx")))     # every layer with every attribute of the plan's network
    outputs = Interpreter(program, weights=FileWeights(Path("weights.safetensors"))).run({"token_ids": ids, …})

    session = InterpretedBundle.open(trt, bundle).session()      # the same behind the contract of every session

It tells whether the network that the builder was given means what the eager model means. What the builder made of it, and
the plugins' kernels, it does not run.
"""

from graphs.trt.interpreter.interpreter import Interpreter
from graphs.trt.interpreter.program import Program
from graphs.trt.interpreter.rule import InterpreterError
from graphs.trt.interpreter.session import InterpretedBundle, InterpretedSession
from graphs.trt.interpreter.weights import FileWeights, InitializerWeights

__all__ = [
    "FileWeights",
    "InitializerWeights",
    "InterpretedBundle",
    "InterpretedSession",
    "Interpreter",
    "InterpreterError",
    "Program",
]
