"""Source of the products that four warps take together on sm_90, whose operands are as many as they are wide."""

_SHAPE = "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{type}.{type}"


def products(pixels: int, depth: int, planes: bool, number: str) -> str:
    """Of a group with so many pixels of a band: scores, and weighted sums of `depth` channels."""
    held = "const u32 (&a)[4]", [f'"r"(a[{i}])' for i in range(4)], "{{%{0}, %{1}, %{2}, %{3}}}"
    across = int(planes)  # whether rows in shared memory are of the inner axis, in scores
    scores = _product(pixels, number, "const A& a", ['"l"(a.descriptor())'], "%{0}", f"1, 1, {across}, {across}")
    sums = _product(depth, number, *held, f"1, 1, {1 - across}")
    return (
        "\n// sums = or += a b, 64 pixels' 16 channels with as many of pixels of a band.\n"
        f"template <typename A, typename B>\nINLINE void multiply_pixels{scores}"
        "\n// sums = or += a b, 64 rows of 16 numbers in registers with 16 pixels' channels.\n"
        f"template <typename B>\nINLINE void multiply_channels{sums}"
    )


def _product(columns: int, number: str, a: str, operands: list[str], named: str, signs: str) -> str:
    """Parameters and body of a product. named: how the instruction has the first factor; signs: what it ends with."""
    count = columns // 2
    sums, bound = (", ".join(form.format(i) for i in range(count)) for form in ("%{}", '"+f"(sums[{}])'))
    first = named.format(*range(count, count + len(operands)))
    b, add = count + len(operands), count + len(operands) + 1
    shape = _SHAPE.format(columns=columns, type=number)
    return f"""(float (&sums)[{count}], {a}, const B& b, bool add) {{
  asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{add}, 0;\\n"
               "{shape} {{{sums}}}, {first}, %{b}, add, {signs};\\n}}"
               : {bound}
               : {", ".join(operands)}, "l"(b.descriptor()), "r"(int(add)));
}}
"""
