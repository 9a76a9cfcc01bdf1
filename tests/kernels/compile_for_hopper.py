"""Compiles the Triton kernels for Hopper, without a GPU, and prints facts about their PTX as JSON.

A program of its own: in the tests' process Triton is an interpreter where there is no GPU.
"""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slideformer.kernels import (
    cross_entropy_triton,
    grouped_triton,
    rms_norm_triton,
    rope_triton,
    routed_triton,
    squares_triton,
    swiglu_triton,
)

TYPES = {
    "*bf16": "x residual weight y dy residual_grad dx dact gate_up act logits"
    " values out left right gradient",
    "*fp32": "rstd dweight_shares cos sin running_max running_sum target_logit lse"
    " weights products",
    "*fp64": "shares",
    "*i64": "targets places",
    "*i32": "ends",
    "fp32": "eps scale softcap smoothing spread z_loss",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}

_PLAIN = {"softcap": None, "smoothing": None, "spread": None}
_WIDE_ROW = {"CENTRED": False, "ROWS": 1, "BLOCK": 4096}
CASES = {
    "squares": (squares_triton._kernel, 8, {"BLOCK": squares_triton._BLOCK}),
    "rms_norm": (
        rms_norm_triton._forward_kernel,
        8,
        {"inner": 1, **_WIDE_ROW},
    ),
    "rms_norm heads": (
        rms_norm_triton._forward_kernel,
        4,
        {"CENTRED": False, "ROWS": 16, "BLOCK": 128},
    ),
    "rms_norm_backward": (
        rms_norm_triton._backward_kernel,
        8,
        {"inner": 1, **_WIDE_ROW, "STAGES": 2},
    ),
    "rope": (rope_triton._rope_kernel, 4, {"INVERSE": False, "HEADS": 16, "HALF": 64}),
    "rope inverse": (rope_triton._rope_kernel, 4, {"INVERSE": True, "HEADS": 16, "HALF": 64}),
    "lse": (cross_entropy_triton._lse_kernel, 8, {**_PLAIN, "LANES": 1024, "VECTOR": 8}),
    "lse form": (cross_entropy_triton._lse_kernel, 8, {"LANES": 1024, "VECTOR": 8}),
    "softmax_grad": (
        cross_entropy_triton._gradient_kernel,
        4,
        {**_PLAIN, "z_loss": None, "BLOCK": 2048},
    ),
    "grouped_gradient": (
        grouped_triton._gradient_kernel,
        8,
        {"ACCUMULATE": False, "WIDEN": False, "ROWS": 64, "TILE": 128},
    ),
    "gather_sum": (routed_triton._gather_sum_kernel, 4, {"EACH": 8, "BLOCK": 1024}),
    "row_products": (routed_triton._row_products_kernel, 4, {"BLOCK": 1024}),
    "softmax_grad form": (cross_entropy_triton._gradient_kernel, 4, {"BLOCK": 2048}),
}
for activation in ("silu", "gelu", "gelu_pytorch_tanh"):
    constants = {"ACTIVATION": activation, "BLOCK": 1024}
    CASES[f"swiglu {activation}"] = (swiglu_triton._forward_kernel, 4, constants)
    CASES[f"swiglu_backward {activation}"] = (swiglu_triton._backward_kernel, 4, constants)


def main() -> None:
    facts = {}
    for case, (kernel, warps, constants) in CASES.items():
        names = kernel.arg_names
        types = {name: TYPE_OF.get(name, "i32") for name in names}
        types |= dict.fromkeys(constants, "constexpr")
        # As at a launch with aligned tensors and sizes: everything but floats divides by 16.
        aligned = [i for i, name in enumerate(names) if types[name] not in ("fp32", "constexpr")]
        source = ASTSource(
            fn=kernel,
            signature=types,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        options = {"num_warps": warps}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = compiled.asm["ptx"]
        facts[case] = {
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4|cp\.async\.cg", ptx)),
            "wide_stores": len(re.findall(r"st\.global\S*\.v4", ptx)),
            "tensor_cores": len(re.findall(r"wgmma\.mma_async", ptx)),
            "prefetches": len(re.findall(r"cp\.async\.cg", ptx)),
        }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
