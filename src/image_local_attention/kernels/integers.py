"""Integers of a launch, on the host, where those of triton take microseconds to look at their arguments."""


def cdiv(count: int, size: int) -> int:
    """How many of a size cover a count."""
    return -(-count // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; n is at least 1."""
    return 1 << (n - 1).bit_length()
