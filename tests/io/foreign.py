"""The layouts of other libraries' checkpoints, decoded by numpy alone from their descriptions: W f32[out, in]."""

import json

import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def stream(words, bits, n):
    """Little-endian codes along the last axis."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    ones = np.unpackbits(raw, axis=-1, bitorder="little")[..., : n * bits]
    return (ones.reshape(*raw.shape[:-1], n, bits) << np.arange(bits)).sum(-1).astype(np.float32)


def spread(scale, n):
    return np.repeat(scale.astype(np.float32), n // scale.shape[-1], axis=-1)


def compressed_tensors(a, config):
    said = config["quantization_config"]
    (group,) = said["config_groups"].values()
    bits, kind = group["weights"]["num_bits"], said["format"]
    scale = a[".weight_scale"]
    if kind in ("float-quantized", "int-quantized"):
        return a[".weight"].astype(np.float32) * scale.reshape(-1, 1)
    if kind == "pack-quantized":
        out, n = a[".weight_shape"]
        zero = np.float32(2 ** (bits - 1))
        if not group["weights"]["symmetric"]:
            zero = spread(stream(a[".weight_zero_point"].T, bits, out).T, n)
        return (stream(a[".weight_packed"], bits, n) - zero) * spread(scale, n)
    codes = np.stack([a[".weight_packed"] & 15, a[".weight_packed"] >> 4], -1).reshape(len(scale), -1)
    if kind.startswith("mxfp4"):
        return E2M1[codes] * spread(np.exp2(scale.astype(np.float32) - 127), codes.shape[1])
    return E2M1[codes] * spread(scale.astype(np.float32) / a[".weight_global_scale"], codes.shape[1])


def gptq(a, config):
    said = config["quantization_config"]
    bits, more = said["bits"], said["checkpoint_format"] == "gptq"
    n, out = a[".qweight"].shape[0] * 32 // bits, a[".qweight"].shape[1]
    codes = stream(a[".qweight"].T, bits, n).T
    zero = stream(a[".qzeros"], bits, out) + more
    return ((codes - zero[a[".g_idx"]]) * a[".scales"].astype(np.float32)[a[".g_idx"]]).T


def awq(a, config):
    def nibbles(words):
        return np.stack([words.view(np.uint32) >> 4 * k & 15 for k in AWQ_ORDER], -1).reshape(len(words), -1)

    per = len(a[".qweight"]) // len(a[".scales"])
    zero, scale = (np.repeat(x, per, axis=0) for x in (nibbles(a[".qzeros"]), a[".scales"]))
    return ((nibbles(a[".qweight"]).astype(np.float32) - zero) * scale.astype(np.float32)).T


def bitsandbytes(a, config):
    (state,) = (json.loads(v.tobytes()) for k, v in a.items() if "quant_state" in k)
    codes = np.stack([a[".weight"][:, 0] >> 4, a[".weight"][:, 0] & 15], -1).reshape(-1)
    absmax = a[".weight.absmax"]
    if "nested_offset" in state:
        nested = np.repeat(a[".weight.nested_absmax"], state["nested_blocksize"])[: len(absmax)]
        absmax = a[".weight.nested_quant_map"][absmax] * nested + np.float32(state["nested_offset"])
    w = a[".weight.quant_map"][codes].reshape(-1, state["blocksize"]) * absmax[:, None]
    return w.reshape(state["shape"])


def mlx(a, config):
    said = config["quantization"]
    n = a[".weight"].shape[1] * 32 // said["bits"]
    codes = stream(a[".weight"], said["bits"], n)
    if said["mode"] == "affine":
        return codes * spread(a[".scales"], n) + spread(a[".biases"], n)
    scale = a[".scales"]
    if said["mode"] == "mxfp4":
        return E2M1[codes.astype(int)] * spread(np.exp2(scale.astype(np.float32) - 127), n)
    return E2M1[codes.astype(int)] * spread(scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32), n)


def onnx(a, config):
    bits, codes = config["quantization_config"]["bits"], a[".weight_Q"]
    out, groups, size = codes.shape
    zero = np.full((out, groups), 2 ** (bits - 1), np.float32)
    if ".weight_zeros" in a:
        zero = stream(a[".weight_zeros"], bits, groups)
    n = 8 * size // bits
    return ((stream(codes, bits, n) - zero[..., None]) * a[".weight_scales"][..., None]).reshape(out, -1)


DECODERS = {
    "compressed-tensors": compressed_tensors,
    "compressed-tensors_w8a8": compressed_tensors,
    "gptq": gptq,
    "gptq_v2": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "mlx": mlx,
    "onnx": onnx,
}
