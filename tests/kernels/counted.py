"""Words that count what is made of them."""


class Counted:
    """Words as the expressions that make them: equal ones are one, as a compiler sees it."""

    def __init__(self):
        self.made = set()

    def word(self, value):
        return value

    def shift(self, w, n):
        return w if n == 0 else self._one("shift", w, n)

    def lop3(self, a, b, c, truth):
        return self._one("lop3", a, b, c, truth)

    def prmt(self, a, b, select):
        return self._one("prmt", a, b, select)

    def fma(self, a, b, c):
        return self._one("fma", a, b, c)

    def fma16(self, a, b, c):
        return self._one("fma16", a, b, c)

    def mad(self, a, b, c):
        return self._one("mad", a, b, c)

    def bytes(self, a, c):
        return self._one("bytes", a, c)

    def look(self, i, first=0):
        """A load from an address, which is an instruction as well."""
        return self._one("load", self._one("mad", i, 4), first)

    def _one(self, *instruction):
        self.made.add(instruction)
        return instruction
