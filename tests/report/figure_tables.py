"""Tables that make every kind of figure, as experiments return them."""

import math

import numpy as np

from qjax.report.build import build

NAMES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_NL", "IQ4_XS", "Q4_0", "MXFP4", "Q3_K_M", "Q2_K", "NF4", "FP8_E4M3")


def found():
    """What a run returned: tables by their names."""
    rng = np.random.default_rng(0)
    bits = [8.5, 6.6, 5.8, 5.07, 4.84, 4.63, 4.81, 4.6, 4.25, 3.47, 4.52, 8.3]
    rows = [
        {"name": name, "whole_bits": b, "kl_mean": 3 * math.exp(-b), "kl_mean_se_clustered": 0.1 * math.exp(-b),
         "perplexity": 23.16 * math.exp(math.exp(-b)), "perplexity_se": 0.2}
        for name, b in zip(NAMES, bits, strict=True)
    ]  # fmt: skip
    rows.append({"name": "float32", "whole_bits": 32.0, "kl_mean": 0.0, "perplexity": 23.16})
    kinds = ("attn q", "attn k", "attn v", "attn o", "mlp gate", "mlp up", "mlp down")
    tensors = [
        {"name": f"layers_{n}/{kind}", "layer": n, "kind": kind, "bits": 6.5625 if kind == "attn v" and n < 2 else 4.5,
         "bytes": 40_000, "relative_rmse": 0.05 + 0.004 * n + 0.002 * len(kind)}
        for n in range(8) for kind in kinds
    ]  # fmt: skip
    tensors.append({"name": "embed", "layer": None, "kind": "embed", "bits": 8.5, "bytes": 900_000,
                    "relative_rmse": 0.005})  # fmt: skip
    middles = np.linspace(-0.2, 0.2, 41)
    shares = np.exp(-((middles / 0.06) ** 2))
    shares /= shares.sum()
    weights = [
        {"of": of, "weight": float(m), "before": float(s), "after": float(s * 1.3 * (n % 3 == 0))}
        for of in ("layers_0/attn/q/kernel", "layers_4/mlp/up/kernel")
        for n, (m, s) in enumerate(zip(middles, shares, strict=True))
    ]
    grid = [{"of": r["of"], "position": 2.5 * r["weight"] + 0.5, "before": r["before"], "after": r["after"]}
            for r in weights if "up" in r["of"]]  # fmt: skip
    outliers = [
        {"of": change, "layer": n, "group": g, "peak": float(rng.uniform(1, 3)) * (20 if g == 3 and not m else 1)}
        for m, change in enumerate(("as it is", "hadamard('in')")) for n in range(8) for g in range(16)
    ]  # fmt: skip
    tokens = [
        {"name": "Q4_K_M", "quantile": q, "kl": 0.002 * (1 - q) ** -0.7} for q in (0, 0.2, 0.5, 0.8, 0.9, 0.99, 0.999)
    ]
    curve = [
        {"name": arm, "step": 10 * n, "loss": 3.0 + math.exp(-n / 5) + 0.05 * a, "scale_drift": 0.01 * a + n / 500}
        for a, arm in enumerate(("continued", "learned scales, distilled", "ldlq + refit", "block by block"))
        for n in range(1, 21)
    ]
    roofline = [
        {"name": f"dot {n}", "flops": 2.0 * n * 4096**2, "bytes": 0.56 * 4096**2, "seconds": 0.01 + 1e-3 * n,
         "peak_flops": 1e11, "peak_bytes": 2e10}
        for n in (1, 4, 16, 64)
    ]  # fmt: skip
    amount = [
        {"mix": mix, "recipe": recipe, "calibration_tokens": 512 * n, "kl_mean": kl * (1 + gain / n),
         "kl_half_interval": kl / 20}
        for mix, kl in (("Q3_K_M", 0.04), ("Q4_0", 0.07)) for recipe, gain in (("imatrix", 0.3), ("best_gguf", 2.0))
        for n in (8, 32, 64, 256)
    ]  # fmt: skip
    parts = [{"name": f"plan {n}", "predicted": 0.01 * 1.4**n, "kl": 0.01 * 1.4**n * float(rng.uniform(0.9, 1.2))}
             for n in range(12)]  # fmt: skip
    rates = [
        {"method": f"{family}:{bits}", "family": family, "layer_bits": bits + 0.1, "kl": kl * 4.0**-bits,
         "kl_half_interval": kl * 4.0**-bits / 10}
        for family, kl in (("trellis", 1.0), ("E8P", 1.5), ("scalar", 2.5)) for bits in (2, 3, 4)
    ]  # fmt: skip
    return {
        "rows": rows, "tensors": tensors, "weights": weights, "grid": grid, "outliers": outliers,
        "tokens": tokens, "curve": curve, "roofline": roofline, "amount": amount, "rates": rates,
        "parts": parts,
    }  # fmt: skip


def result(title="Every kind of figure"):
    """A result with all of them."""
    return build(found(), title=title, command="qjax run configs/all.toml", note="made up")
