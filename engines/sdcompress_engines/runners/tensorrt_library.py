"""What the two TensorRT libraries have in common for a runner, and what only one of them has."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ..errors import shorten

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
KERNELS = ("lazy", "eager", "none")
# What the runner and `execution` use of both libraries, besides constructors. A test looks up each name.
USED_API = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_dtype",
        "get_tensor_shape",
        "get_tensor_profile_shape",
        "num_optimization_profiles",
        "create_execution_context",
        "get_device_memory_size_for_profile_v2",
        "streamable_weights_size",
        "weight_streaming_budget_v2",
        "get_weight_streaming_automatic_budget",
    ),
    "IExecutionContext": (
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "infer_shapes",
        "get_tensor_shape",
        "update_device_memory_size_for_shapes",
        "set_device_memory",
        "execute_async_v3",
    ),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "ILogger": ("log", "ERROR", "INTERNAL_ERROR"),
    "DataType": tuple(DTYPES),
}
# For engines that were built without their weights.
USED_API_REFIT = {
    "Refitter": ("refit_cuda_engine",),
    "OnnxParserRefitter": ("refit_from_file", "num_errors", "get_error"),
    "ParserError": ("desc",),
}
# For exchanging weights. Some versions lack the last of the refitter's, and take weights from the host's memory only.
USED_API_EXCHANGE = {
    "Refitter": ("set_named_weights", "get_missing_weights", "refit_cuda_engine", "refit_cuda_engine_async"),
    "TensorLocation": ("DEVICE", "HOST"),
}
# What only some versions have, and is looked up before it is used: a runtime configuration from TensorRT 10.11 on, the
# rest in TensorRT-RTX.
USED_API_RTX = {
    "Runtime": ("get_engine_validity",),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": (
        "set_execution_context_allocation_strategy",
        "create_runtime_cache",
        "set_runtime_cache",
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
    ),
    "IRuntimeCache": ("serialize", "deserialize"),
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
    "DynamicShapesKernelSpecializationStrategy": tuple(name.upper() for name in KERNELS),
    "EngineValidity": ("INVALID",),
    "EngineInvalidityDiagnostics": ("VERSION_MISMATCH", "UNSUPPORTED_CC", "MALFORMED_ENGINE"),
}


def explain_invalid(trt: Any, runtime: Any, content: bytes) -> str | None:
    """Returns why a runtime refuses an engine, from its own check of the engine's header.

    None where it takes the engine, or has no such check.

    Args:
        trt: the library's module.
        runtime: of the library.
        content: the engine's bytes.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, bits = runtime.get_engine_validity(content)
    if validity != trt.EngineValidity.INVALID:
        return None
    return (
        ", ".join(
            name.lower().replace("_", " ")
            for name, bit in trt.EngineInvalidityDiagnostics.__members__.items()
            if int(bits) & int(bit)
        )
        or None
    )


def create_log(trt: Any) -> Any:
    """Returns a logger that keeps its last errors for our message, and prints nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(shorten(message))

        def last_errors(self) -> str:
            return "; ".join(self.errors) or "it gave no reason"

    return Log()
