"""Vector codes in plain float64: E8P12 by all its points, trellises by a table of all transitions or of all rings."""

import itertools

import numpy as np


def e8p_points() -> np.ndarray:
    """{(256 a and byte): point}, f64[65536, 8], as the format's page says it, bit by bit."""
    short = [a for a in itertools.product((1, 3, 5), repeat=8) if sum(x * x for x in a) <= 40]
    places = list(itertools.combinations(range(8), 5))[:29]
    found = []
    for a in short + [tuple(3 if i in at else 1 for i in range(8)) for at in places]:
        a = np.array(a) / 2
        if a.sum() % 2:
            a[7] = -a[7]
        for byte in range(256):
            parity = bin(byte).count("1") % 2
            changes = byte ^ parity
            found.append([(-x if changes >> i & 1 else x) + (-0.25 if parity else 0.25) for i, x in enumerate(a)])
    return np.array(found)


def values(code: str, L: int) -> np.ndarray:
    """f64[2^L] of a code of one number, by Python's integers."""
    out = []
    for s in range(2**L):
        if code == "3inst":
            u = ((89226354 * s + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
            out.append(float(np.array([u & 0xFFFF, u >> 16], np.uint16).view(np.float16).astype(float).sum()))
        else:
            u = {"1mad": 34038481 * s + 76625530, "mul1": 0x83DCD12D * s}[code] % 2**32
            out.append((sum(u.to_bytes(4, "little")) - 510) / {"1mad": 147.8, "mul1": 147.7}[code])
    return np.array(out)


def states(stream: bytes, k: int, L: int) -> list[int]:
    """After each k bits of a ring the last L."""
    bits = "".join(f"{byte:08b}" for byte in stream)
    return [int((bits + bits + bits)[len(bits) + end - L : len(bits) + end], 2) for end in range(k, len(bits) + 1, k)]


def viterbi(x: np.ndarray, weight: np.ndarray, table: np.ndarray, k: int, seam: int | None) -> list[int]:
    """The states of the best path, by a list of each state's predecessors; from seam to seam where one is given."""
    S, R = len(table), 2**k
    before = [[(s >> k) | (r * (S // R)) for r in range(R)] for s in range(S)]
    cost = weight[0] * (x[0] - table) ** 2
    if seam is not None:
        cost = np.where(np.arange(S) // R == seam, cost, np.inf)
    came = []
    for t in range(1, len(x)):
        options = cost[before]
        came.append(np.take_along_axis(np.array(before), options.argmin(axis=1)[:, None], 1)[:, 0])
        cost = options.min(axis=1) + weight[t] * (x[t] - table) ** 2
    if seam is not None:
        cost = np.where(np.arange(S) % (S // R) == seam, cost, np.inf)
    path = [int(cost.argmin())]
    for choice in reversed(came):
        path.append(int(choice[path[-1]]))
    return path[::-1]


def ring(x: np.ndarray, weight: np.ndarray, table: np.ndarray, k: int) -> list[int]:
    """QTIP's two searches."""
    half = len(x) // 2
    free = viterbi(np.roll(x, half), np.roll(weight, half), table, k, None)
    return viterbi(x, weight, table, k, free[half] >> k)


def best_ring(x: np.ndarray, weight: np.ndarray, table: np.ndarray, k: int) -> float:
    """The least error of all rings, by trying all."""
    T, L = len(x), int(np.log2(len(table)))
    found = np.inf
    for symbols in itertools.product(range(2**k), repeat=T):
        whole = sum(s << (k * (T - 1 - t)) for t, s in enumerate(symbols))
        twice = (whole << (k * T)) | whole
        at = [(twice >> (k * (T - 1 - t))) % 2**L for t in range(T)]
        found = min(found, float((weight * (x - table[at]) ** 2).sum()))
    return found
