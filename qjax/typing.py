"""Shape types for signatures: `Float[Array, "*b n"]`. They document always and are checked at run time in the tests.

jaxtyping is a test dependency only; where it is absent the names stand for plain arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Integer, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, Integer, Shaped, UInt8
    except ImportError:

        class _Untyped:
            def __class_getitem__(cls, _: Any) -> Any:
                return Any

        Bool = Float = Int = Integer = Shaped = UInt8 = _Untyped

__all__ = ["Array", "Bool", "Float", "Int", "Integer", "Shaped", "UInt8"]
