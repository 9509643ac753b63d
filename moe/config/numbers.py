"""Numbers that would do, and how a person reads them."""

import math


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def choice(numbers: list[int]) -> str:
    """The numbers that would do, as a person reads them."""
    if len(numbers) == 1:
        return str(numbers[0])
    shown = numbers if len(numbers) <= 16 else [*numbers[:8], "...", *numbers[-4:]]
    return f"one of {', '.join(map(str, shown))}"
