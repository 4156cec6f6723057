"""Families at equal bits: KL that falls fourfold a bit is met between any two members; claims by their intervals."""

import math

import numpy as np
import pytest

from qjax.evaluate.equal_bits import Member, at_bits, at_equal_bits, claims, on_front


def family(name, at_two, bits=(2.0, 3.0, 4.0), texts=(1.0, 1.1, 0.9)):
    return [Member(f"{name}{b:g}", name, b, tuple(t * at_two * 4.0 ** (2 - b) for t in texts)) for b in bits]


@pytest.mark.parametrize("bits", [2.0, 2.3, 3.0, 3.75, 4.0])
def test_between_members_the_logarithm_is_linear(bits):
    logs, between = at_bits(family("a", 0.4), bits)
    np.testing.assert_allclose(np.exp(logs), [t * 0.4 * 4 ** (2 - bits) for t in (1.0, 1.1, 0.9)], rtol=1e-12)
    assert between == {2.0: "a2", 3.0: "a3", 4.0: "a4", 2.3: "a2, a3", 3.75: "a3, a4"}[bits]


def test_nothing_is_said_beyond_the_ends_and_what_is_beaten_is_no_neighbour():
    members = [*family("a", 0.4), Member("worse", "a", 2.5, (0.5, 0.5, 0.5)), Member("same bits", "a", 3.0, (1.0,) * 3)]
    on = on_front([(m.bits, float(np.mean(m.kl))) for m in members])
    assert [m.name for m, best in zip(members, on, strict=True) if best] == ["a2", "a3", "a4"]
    assert at_bits(members, 1.9) is None and at_bits(members, 4.1) is None
    assert at_bits(members, 2.5)[1] == "a2, a3"


def test_claims_are_told_apart_text_by_text():
    """A ratio that is the same with every text is certain, however much texts differ."""
    members = (
        family("a", 0.4) + family("b", 0.5) + family("c", 0.5, texts=(0.5, 1.0, 2.0)) + family("d", 0.1, (3.5, 4.0))
    )
    rows = claims(members, (2.5, 3.5), ("a", "b", "c", "d"))
    assert [(r["bits"], r["claim"], r["verdict"]) for r in rows] == [
        (2.5, "a < b", "holds"), (2.5, "b < c", "tie"),
        (3.5, "a < b", "holds"), (3.5, "b < c", "tie"), (3.5, "c < d", "tie"),
    ]  # fmt: skip
    assert rows[0]["ratio"] == pytest.approx(0.8) and rows[0]["ratio_half_width"] == pytest.approx(0.0, abs=1e-9)
    assert claims(members, (2.5,), ("b", "a"))[0]["verdict"] == "fails"
    one = family("a", 0.4, texts=(1.0,)) + family("b", 0.5, texts=(1.0,))
    assert claims(one, (2.5,), ("a", "b"))[0] == {
        "bits": 2.5, "claim": "a < b", "ratio": pytest.approx(0.8), "verdict": "one text",
    }  # fmt: skip


def test_the_table_has_a_row_where_a_family_has_a_place():
    rows = at_equal_bits(family("a", 0.4) + family("b", 0.5, (3.0, 4.0)), (2.5, 3.5))
    assert [(r["bits"], r["family"]) for r in rows] == [(2.5, "a"), (3.5, "a"), (3.5, "b")]
    assert rows[0]["kl"] == pytest.approx(0.2 * math.exp(np.log([1.0, 1.1, 0.9]).mean()))
    assert 0 < rows[0]["kl_half_interval"] < rows[0]["kl"]
