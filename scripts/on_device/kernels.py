"""Products with packed weights by the kernels that `qjax.dot` takes, beside bfloat16: `qjax bench kernels`, short."""

from qjax.bench.products import Contest, contest

FORMATS = ("Q4_0", "int4_g128", "Q4_K", "Q2_K", "Q8_0", "NF4", "E8P_2", "trellis2_L12_3inst")
ERROR = 2e-2  # of bfloat16 inputs, of the largest result


def measure(dry: bool) -> dict:
    c = Contest(("Q4_0", "E8P_2", "trellis2_L12_3inst"), ((64, 256),), (1,), cold_bytes=1 << 16, rounds=1)
    if not dry:
        c = Contest(FORMATS, ((8192, 8192),), (1, 16, 64), "bfloat16", cold_bytes=512 << 20, rounds=5)
    rows = list(contest(c))
    lines = [
        f"{r['name']} by {r['kernel']}, {r['out']} x {r['in']}, {r['rows']} rows: {1e6 * r['seconds']:.0f} us, "
        f"{r['over_bfloat16']:.2f} of bfloat16, {r['of_copy']:.2f} of a copy, error {r['error']:.1e}" for r in rows
    ]  # fmt: skip
    return {"ok": all(r["error"] < ERROR for r in rows), "lines": lines, "rows": rows}
