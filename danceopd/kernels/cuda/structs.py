"""The argument structs of the CUDA sources, as ctypes; a test compiles a comparison, field by field."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_longlong, c_void_p


class Strides(Structure):
    """Batch and token strides of a tensor, in elements."""
    _fields_ = [("batch", c_longlong), ("token", c_longlong)]


class Strides4(Structure):
    """Batch, token and head strides, in elements."""
    _fields_ = [("batch", c_longlong), ("token", c_longlong), ("head", c_longlong)]


class CStream(Structure):
    """A `SplitStream` with pointers and strides, and those of its gradients: `Stream` of qkv_prep.cu."""
    _fields_ = [
        *((name, c_void_p) for name in "q k v weight_q weight_k cos sin dq dk dv partial".split()),
        *((name, Strides) for name in "q_at k_at v_at rope_at dq_at dk_at dv_at".split()),
        *((name, c_int) for name in "tokens first flags unused".split()),
    ]


class Prep(Structure):
    """The argument of qkv_prep.cu."""
    _fields_ = [
        ("image", CStream),
        ("text", CStream),
        *((name, c_void_p) for name in "q k v grad_q grad_k grad_v".split()),
        *((name, Strides4) for name in "grad_q_at grad_k_at grad_v_at".split()),
        ("heads", c_int),
        ("tokens", c_int),
        ("eps", c_float),
        ("unused", c_int),
    ]


class AddNorm(Structure):
    """The argument of add_norm.cu."""
    _fields_ = [
        *((name, c_void_p) for name in "x y gate y_weight weight scale shift grad_sum grad_normed".split()),
        *((name, c_void_p) for name in "sum normed dx dy".split()),
        *((f"{n}_at", Strides) for n in "x y gate scale shift grad_sum grad_normed".split()),
        ("out_batch", c_longlong),
        ("width", c_int),
        ("flags", c_int),
        ("eps", c_float),
        ("y_eps", c_float),
    ]


class Swiglu(Structure):
    """The argument of swiglu.cu."""
    _fields_ = [
        *((name, c_void_p) for name in "gate up passed grad out dgate dup".split()),
        *((f"{name}_at", Strides) for name in "gate up passed grad out dgate dup".split()),
        ("width", c_int),
        ("passed_width", c_int),
    ]
