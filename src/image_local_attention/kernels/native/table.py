"""A short table of measured facts: which plan a task takes, and so what the native kernels serve.

Where blocks walk down the map (`walk_table`), they do so instead.

What decides: a halo that leaves room for several blocks on a multiprocessor is held whole, for tiles of 8x8 pixels, or
of few rows where several heads share the copies of a pixel, or where columns lie side by side. A larger one passes in
bands of two or four rows: most tiles are of 4 rows, for all warps then need the same bands, those of halves often of 8,
and as wide as registers let blocks be. In planes of halves, whose halos have many unseen columns, warps take two units
where bands pass, for these share what they read of a band. Their tiles are shifted where the columns that this spares
cost more than numbers that are written one by one: of few channels, and past 13x13. Products in three passes of TF32
take so long that copies hide behind them. Steps of wide windows are of as many pairs of blocks as fill whole rows, for
these lie alike.
"""

from typing import NamedTuple

from .plan import UNFUSED, Form, Plan, shape, shared, suits


class Row(NamedTuple):
    depth: int  # channels per head
    kernel: int  # the larger side of the widest window
    plan: Plan
    pixels: int = 1 << 60  # of all images and heads, at most: few blocks are to share the multiprocessors evenly


# Rows are read from the top, the first of this depth that is wide enough and suits the heads is taken. A figure is
# milliseconds of that kernel on an H200 when plans were tried, then those of Triton's for the same; delta is part of
# grad_query, and of Triton's figure; "with delta", of both. A row without a figure: by analogy with another.
# docs/performance.md has what passes take.
_TABLE: dict[tuple[str, str, bool], tuple[Row, ...]] = {
    ("forward", "half", False): (
        Row(16, 7, Plan((4, 8), 4, 5, 9)),  # 512-4x16-k5 0.052 : 0.095, k7 0.075 : 0.111
        Row(16, 9, Plan((4, 8), 4, 4, 9)),  # 512-4x16-k9 0.086 : 0.127
        Row(16, 9, Plan((8, 8), 4, 5, 9, 32)),  # 512-4x16-k7 0.082, k9 0.097
        Row(16, 13, Plan((8, 8), 4, 5, 4, 32)),  # 512-4x16-k11 0.155 : 0.264, k13 0.145 : 0.257
        Row(16, 21, Plan((8, 8), 4, 3, 6, 32)),  # 512-4x16-k21 0.250 : 0.367
        Row(32, 5, Plan((8, 8), 8, 2, 4)),  # 512-2x32-k5 0.043
        Row(32, 9, Plan((4, 8), 4, 4, 9)),  # 512-4x32-k9 0.123 : 0.160
        Row(32, 7, Plan((8, 8), 4, 5, 9)),  # 2048-32-k7 0.381 : 0.502
        Row(32, 9, Plan((8, 8), 4, 4, 9)),
        Row(32, 13, Plan((8, 8), 8, 2, 4)),  # 512-2x32-k11 0.110 : 0.152, k13 0.104 : 0.151
        Row(64, 5, Plan((8, 8), 4, 4, 4)),  # 512-64-k3 0.039 : 0.050, 2048-64-k5 0.547 : 0.740
        Row(64, 7, Plan((8, 16), 8, 2, 9), pixels=2**15),  # 4x64-2x64-k7 0.012 : 0.013
        Row(64, 9, Plan((8, 8), 4, 3, 9)),  # 8x128-8x64-k7 0.181 : 0.221, k9 0.192 : 0.249
        Row(64, 13, Plan((8, 16), 8, 2, 4, band=4, slots=3)),  # 8x128-8x64-k13 0.273 : 0.350
        Row(64, 21, Plan((8, 8), 4, 3, 6, band=4, slots=2)),  # 512-64-k21 0.146 : 0.162
    ),
    ("grad_query", "half", False): (
        Row(16, 9, Plan((4, 8), 8, 2, 1)),  # 512-4x16-k5 0.065 : 0.129, k7 0.089 : 0.141, k9 0.109 : 0.154
        Row(16, 9, Plan((8, 16), 8, 2, 1, 32)),  # 512-4x16-k9 0.108
        Row(16, 13, Plan((8, 8), 4, 5, 4, 32)),  # 512-4x16-k11 0.137 : 0.247, k13 0.151 : 0.243
        Row(16, 21, Plan((16, 16), 16, 2, 6, 32)),  # 512-4x16-k21 0.258 : 0.398
        Row(32, 5, Plan((8, 8), 8, 2, 1)),  # 512-2x32-k5 0.060 : 0.092
        Row(32, 11, Plan((8, 8), 8, 2, 4)),  # 512-4x32-k9 0.166 : 0.212, 2x32-k11 0.108 : 0.187
        Row(32, 7, Plan((4, 16), 4, 3, 1)),  # 2048-32-k7 0.480 : 0.673
        Row(32, 13, Plan((4, 8), 4, 2, 4)),  # 512-2x32-k13 0.147 : 0.186
        Row(64, 3, Plan((8, 8), 4, 4, 4)),  # 512-64-k3 0.057 : 0.075
        Row(64, 5, Plan((8, 16), 8, 2, 4)),  # 2048-64-k5 0.763 : 1.07
        Row(64, 7, Plan((4, 8), 2, 4, 4), pixels=2**15),  # 4x64-2x64-k7 0.0166 : 0.0181
        Row(64, 7, Plan((8, 8), 4, 3, 4)),  # 8x128-8x64-k7 0.236 : 0.297
        Row(64, 13, Plan((8, 16), 8, 2, 2, band=4, slots=2)),  # 8x128-8x64-k13 0.360 : 0.434
        Row(64, 21, Plan((4, 16), 4, 2, 6, band=4, slots=2)),  # 512-64-k21 0.184 : 0.186
    ),
    ("grad_key_value", "half", False): (
        Row(16, 5, Plan((8, 16), 8, 2, 1, 32)),  # 512-4x16-k5 0.090 : 0.140
        Row(16, 7, Plan((8, 8), 4, 2, 7, 64)),  # 512-4x16-k7, with delta, 0.139 : 0.182
        Row(16, 9, Plan((8, 8), 4, 4, 1, 32)),  # 512-4x16-k9 0.142 : 0.188
        Row(16, 11, Plan((8, 8), 4, 4, 2, 32)),  # 512-4x16-k11 0.190 : 0.305
        Row(16, 13, Plan((8, 16), 8, 2, 4, 32)),  # 512-4x16-k13 0.207 : 0.310
        Row(16, 21, Plan((8, 16), 8, 2, 6, 32)),  # 512-4x16-k21, with delta, 0.371 : 0.532
        Row(32, 5, Plan((8, 8), 8, 2, 4)),  # 512-2x32-k5 0.078 : 0.104
        Row(32, 9, Plan((8, 8), 8, 2, 1)),  # 512-4x32-k9 0.233 : 0.254
        Row(32, 7, Plan((4, 16), 4, 2, 7)),  # 2048-32-k7, with delta, 0.731 : 0.953
        Row(32, 11, Plan((8, 8), 8, 2, 2)),  # 512-2x32-k11 0.170 : 0.243
        Row(32, 13, Plan((16, 8), 16, 1, 2)),  # 512-2x32-k13 0.195 : 0.250
        Row(64, 3, Plan((8, 8), 4, 4, 4)),  # 512-64-k3 0.065 : 0.085
        Row(64, 5, Plan((4, 8), 2, 6, 4)),  # 2048-64-k5, with delta, 1.14 : 1.52
        Row(64, 7, Plan((4, 16), 4, 2, 7)),  # 8x128-8x64-k7, with delta, 0.380 : 0.489
        Row(64, 11, Plan((8, 8), 4, 2, 4)),  # 8x128-8x64-k9 0.392 : 0.484, 512-64-k11 0.163 : 0.209
        Row(64, 13, Plan((4, 16), 4, 3, 2, band=2, slots=3)),  # 8x128-8x64-k13 0.580 : 0.768
        Row(64, 21, Plan((4, 16), 4, 2, 6, band=4, slots=2)),  # 512-64-k21, with delta, 0.267 : 0.345
    ),
    ("forward", "half", True): (
        # 512-4x16-k5 0.090 : 0.137, k7 0.102 : 0.154, k9 0.113 : 0.168
        Row(16, 9, Plan((4, 32), 8, 1, 2, shifted=True)),
        Row(16, 13, Plan((8, 8), 4, 5, 4)),  # 512-4x16-k13 0.213 : 0.342
        Row(16, 21, Plan((4, 16), 2, 4, 4, band=4, slots=3, units=2, shifted=True)),  # 512-4x16-k21 0.417 : 0.457
        Row(32, 5, Plan((4, 32), 8, 3, 2)),  # 512-2x32-k5 0.081 : 0.113
        Row(32, 7, Plan((4, 64), 8, 1, 2, band=2, slots=3, units=2, shifted=True)),  # 2048-32-k7 0.624 : 0.948
        Row(32, 9, Plan((16, 16), 16, 1, 1, shifted=True)),  # 512-4x32-k9 0.218 : 0.284
        Row(32, 13, Plan((8, 16), 8, 2, 6)),  # 512-2x32-k13 0.162 : 0.181
        Row(64, 5, Plan((4, 32), 4, 2, 1, band=2, slots=2, units=2)),  # 2048-64-k5 1.23 : 1.78
        Row(64, 7, Plan((16, 16), 16, 1, 4), pixels=2**15),  # 4x64-2x64-k7 0.0190 : 0.0198
        Row(64, 7, Plan((4, 32), 8, 2, 3, band=2, slots=3)),  # 8x128-8x64-k7 0.345 : 0.393
        Row(64, 13, Plan((8, 32), 8, 1, 3, band=4, slots=3, units=2)),  # 8x128-8x64-k13 0.457 : 0.548
        # 512-64-k19 0.202 : 0.238, k21 0.217 : 0.259
        Row(64, 21, Plan((4, 32), 4, 2, 4, band=2, slots=2, units=2, shifted=True)),
    ),
    ("grad_query", "half", True): (
        Row(16, 7, Plan((4, 32), 8, 2, 1)),  # 512-4x16-k5 0.100 : 0.186, k7 0.122 : 0.204
        Row(16, 9, Plan((4, 32), 8, 2, 1, shifted=True)),  # 512-4x16-k9 0.137 : 0.228
        Row(16, 13, Plan((4, 32), 8, 2, 2)),  # 512-4x16-k13 0.207 : 0.278
        Row(16, 21, Plan((8, 16), 8, 1, 4, shifted=True)),  # 512-4x16-k21 0.372 : 0.551
        Row(32, 5, Plan((4, 64), 8, 2, 2, band=2, slots=3, units=2)),  # 512-2x32-k5 0.096 : 0.144
        Row(32, 7, Plan((4, 48), 12, 2, 1, band=2, slots=2, shifted=True)),  # 2048-32-k7 0.859 : 1.13
        Row(32, 9, Plan((4, 32), 4, 2, 3, units=2)),  # 512-4x32-k9 0.250 : 0.319
        Row(64, 5, Plan((4, 64), 16, 1, 1, band=2, slots=3)),  # 2048-64-k5 1.50 : 2.31
        Row(64, 7, Plan((8, 32), 8, 1, 2, band=2, slots=3, units=2), pixels=2**15),  # 4x64-2x64-k7 0.0196 : 0.0271
        Row(64, 7, Plan((4, 32), 4, 2, 2, band=2, slots=2, units=2)),  # 8x128-8x64-k7 0.411 : 0.546
        Row(64, 13, Plan((8, 32), 8, 1, 6, band=4, slots=2, units=2)),  # 8x128-8x64-k13 0.561 : 0.658
        # 512-64-k19 0.260 : 0.288, k21 0.275 : 0.294
        Row(64, 21, Plan((4, 48), 12, 1, 4, band=2, slots=2, shifted=True)),
    ),
    ("grad_key_value", "half", True): (
        Row(16, 7, Plan((8, 16), 8, 3, 7)),  # with delta: 512-4x16-k5 0.192 : 0.238, k7 0.223 : 0.269
        Row(16, 9, Plan((8, 16), 8, 3, 7, shifted=True)),  # 512-4x16-k9, with delta, 0.239 : 0.305
        Row(16, 13, Plan((16, 8), 8, 2, 2)),  # 512-4x16-k13 0.288 : 0.329
        Row(16, 17, Plan((8, 16), 4, 2, 6, units=2, shifted=True)),  # 512-4x16-k17 0.374 : 0.712
        Row(16, 21, Plan((8, 16), 8, 1, 4, shifted=True)),  # 512-4x16-k21 0.560 : 0.641
        Row(32, 7, Plan((4, 32), 8, 2, 7)),  # 2048-32-k7, with delta, 1.31 : 2.03
        Row(32, 9, Plan((4, 32), 4, 3, 1, band=2, slots=3, units=2)),  # 512-4x32-k9, with delta, 0.407 : 0.617
        Row(32, 13, Plan((8, 16), 8, 2, 4)),  # 512-2x32-k13 0.255 : 0.346
        Row(64, 5, Plan((4, 48), 12, 1, 2, band=2, slots=3)),  # 2048-64-k5, with delta, 1.93 : 2.68
        Row(64, 7, Plan((4, 32), 4, 2, 2, band=2, slots=3, units=2)),  # 8x128-8x64-k7, with delta, 0.603 : 0.796
        Row(64, 13, Plan((8, 32), 8, 1, 1, band=4, slots=2, units=2)),  # 8x128-8x64-k13, with delta, 0.854 : 1.07
        Row(64, 21, Plan((4, 48), 12, 1, 2, band=2, slots=2, shifted=True)),  # 512-64-k21, with delta, 0.405 : 0.454
    ),
    ("forward", "tf32", False): (
        Row(64, 5, Plan((8, 8), 4, 2, 2)),  # 512-64-k5 0.085 : 0.087
    ),
    ("grad_query", "tf32", False): (
        Row(64, 7, Plan((8, 8), 4, 2, 2)),  # 512-64-k5 0.135 : 0.144
        Row(64, 13, Plan((4, 16), 4, 2, 2, band=2, slots=3)),  # 512-64-k11 0.240 : 0.269
    ),
    ("grad_key_value", "tf32", False): (
        Row(64, 7, Plan((8, 8), 4, 3, 4)),  # 512-64-k5, with delta, 0.174 : 0.189
        Row(64, 13, Plan((4, 16), 4, 2, 2, band=2, slots=3)),  # 512-64-k11 0.317 : 0.436
    ),
    ("forward", "tf32", True): (
        Row(64, 7, Plan((8, 16), 8, 1, 1, band=2, slots=3), pixels=2**16),  # 512-64-k5 0.142 : 0.171
        Row(64, 5, Plan((8, 32), 16, 1, 1, band=2, slots=2)),  # 512-64-k5 0.129 : 0.171
        Row(64, 7, Plan((8, 16), 8, 1, 1, band=2, slots=3)),  # 512-64-k5 0.142 : 0.171
        Row(64, 13, Plan((4, 32), 8, 1, 1, band=1, slots=4)),  # 512-64-k11 0.199 : 0.255
    ),
    ("grad_query", "tf32", True): (
        Row(64, 7, Plan((4, 32), 8, 1, 1, band=2, slots=3), pixels=2**16),
        Row(64, 13, Plan((4, 32), 8, 1, 2, band=2, slots=3), pixels=2**16),  # larger tiles, by reasoning, are too few
        Row(64, 5, Plan((8, 32), 16, 1, 1, band=2, slots=3)),  # 512-64-k5 0.187 : 0.270
        Row(64, 7, Plan((4, 32), 8, 1, 1, band=2, slots=3)),  # 512-64-k5 0.192 : 0.270
        Row(64, 13, Plan((8, 24), 12, 1, 2, band=2, slots=3)),  # 512-64-k11 0.270 : 0.442
    ),
    ("grad_key_value", "tf32", True): (
        Row(64, 7, Plan((4, 32), 8, 1, 1)),  # 512-64-k5 0.280 : 0.371
        Row(64, 13, Plan((8, 16), 8, 1, 2, band=2, slots=3)),  # 512-64-k11 0.407 : 0.533
    ),
    ("forward", "three-pass", False): (
        Row(32, 21, Plan((4, 8), 2, 1, 3, band=4, slots=2), pixels=2**13),
        Row(64, 21, Plan((4, 8), 2, 1, 3, band=4, slots=2), pixels=2**13),
        Row(16, 13, Plan((4, 16), 4, 4, 2, 64, band=2, slots=3)),  # 512-16-k11 0.101 : 0.119
        Row(16, 21, Plan((4, 16), 4, 3, 3, 64, band=2, slots=3)),
        Row(32, 7, Plan((4, 32), 8, 2, 2)),
        Row(32, 13, Plan((4, 16), 4, 2, 2, band=2, slots=3)),
        Row(32, 21, Plan((4, 16), 4, 2, 3, band=2, slots=3)),
        Row(64, 7, Plan((8, 8), 4, 2, 2)),  # 512-64-k5 0.114 : 0.128
        Row(64, 13, Plan((4, 16), 4, 2, 2, band=2, slots=3)),  # 512-64-k11 0.300 : 0.344
        Row(64, 21, Plan((4, 32), 8, 1, 3, band=2, slots=3)),  # 128-64-k21 0.051 : 0.061
    ),
    ("grad_query", "three-pass", False): (
        Row(32, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        Row(64, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        Row(16, 13, Plan((4, 16), 4, 3, 2)),  # 512-16-k11 0.128 : 0.161
        Row(16, 21, Plan((4, 16), 4, 3, 3, 64, band=2, slots=3)),
        Row(32, 7, Plan((8, 16), 8, 1, 1)),
        Row(32, 13, Plan((4, 32), 8, 1, 2, band=2, slots=3)),
        Row(32, 21, Plan((4, 32), 8, 1, 3, band=2, slots=3)),
        Row(64, 7, Plan((4, 8), 2, 4, 1)),  # 512-64-k5 0.192 : 0.207
        Row(64, 13, Plan((4, 16), 4, 2, 1, band=2, slots=3)),  # 512-64-k11 0.485 : 0.510
        Row(64, 21, Plan((4, 32), 8, 1, 1, band=4, slots=2)),  # 128-64-k21 0.076 : 0.088
    ),
    ("grad_key_value", "three-pass", False): (
        Row(32, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        Row(64, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        Row(16, 13, Plan((4, 16), 4, 4, 1)),  # 512-16-k11 0.170 : 0.228
        Row(16, 21, Plan((4, 16), 4, 3, 2, 64, band=2, slots=3)),
        Row(32, 7, Plan((4, 16), 4, 2, 2)),
        Row(32, 13, Plan((8, 16), 8, 1, 2, band=2, slots=3)),
        Row(32, 21, Plan((4, 32), 8, 1, 3, band=2, slots=3)),
        Row(64, 7, Plan((4, 16), 4, 2, 1)),  # 512-64-k5 0.257 : 0.293
        Row(64, 13, Plan((4, 16), 4, 2, 1, band=2, slots=3)),  # 512-64-k11 0.650 : 0.773
        Row(64, 21, Plan((4, 32), 8, 1, 1, band=2, slots=3)),  # 128-64-k21 0.105 : 0.129
    ),
    ("forward", "three-pass", True): (
        Row(32, 21, Plan((4, 8), 2, 1, 3, band=4, slots=2), pixels=2**13),
        # 32-64-k5 0.0089 : 0.0118, k21 0.038 : 0.056, 64-64-k21 0.035 : 0.059
        Row(64, 21, Plan((4, 8), 2, 1, 3, band=4, slots=2), pixels=2**13),
        Row(16, 13, Plan((4, 32), 8, 2, 2)),  # 128-16-k5 0.0081 : 0.0101, k11 0.013 : 0.016, 512-16-k11 0.100 : 0.218
        Row(16, 21, Plan((4, 16), 4, 3, 6, band=4, slots=2)),  # 128-16-k21 0.023 : 0.035
        Row(32, 7, Plan((4, 32), 8, 2, 2)),  # 128-32-k5 0.011 : 0.015
        Row(32, 13, Plan((4, 16), 4, 2, 2, band=2, slots=3)),  # 128-32-k11 0.018 : 0.023
        Row(32, 21, Plan((4, 16), 4, 2, 3, band=2, slots=3)),  # 128-32-k21 0.034 : 0.057
        Row(64, 7, Plan((4, 32), 8, 1, 2), pixels=2**15),  # 128-64-k5 0.017 : 0.025
        Row(64, 13, Plan((4, 32), 8, 1, 2, band=2, slots=3), pixels=2**15),  # 128-64-k11 0.030 : 0.041
        Row(64, 7, Plan((4, 16), 4, 2, 1, band=2, slots=3)),  # 512-64-k5 0.180 : 0.283
        Row(64, 13, Plan((4, 16), 4, 2, 2, band=2, slots=3)),  # 512-64-k11 0.345 : 0.552
        Row(64, 21, Plan((4, 32), 8, 1, 3, band=2, slots=3)),  # 128-64-k21 0.056 : 0.115
    ),
    ("grad_query", "three-pass", True): (
        Row(32, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        # 32-64-k5 0.013 : 0.017, k21 0.051 : 0.059, 64-64-k21 0.055 : 0.071
        Row(64, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        Row(16, 7, Plan((4, 32), 8, 2, 2)),  # 128-16-k5 0.0094 : 0.0153
        Row(16, 13, Plan((8, 8), 4, 3, 2)),  # 128-16-k11 0.015 : 0.022, 512-16-k11 0.127 : 0.191
        Row(16, 21, Plan((4, 16), 4, 3, 3, band=2, slots=3)),  # 128-16-k21 0.028 : 0.050
        Row(32, 7, Plan((8, 16), 8, 1, 1)),  # 128-32-k5 0.014 : 0.023
        Row(32, 13, Plan((4, 32), 8, 1, 2, band=2, slots=3)),  # 128-32-k11 0.023 : 0.033
        Row(32, 21, Plan((4, 32), 8, 1, 3, band=2, slots=3)),  # 128-32-k21 0.042 : 0.077
        Row(64, 7, Plan((4, 32), 8, 1, 1, band=2, slots=2), pixels=2**15),  # 128-64-k5 0.0221 : 0.0434
        Row(64, 5, Plan((8, 24), 12, 1, 1, band=2, slots=3)),  # 512-64-k5 0.253 : 0.400
        Row(64, 13, Plan((4, 16), 4, 2, 1, band=2, slots=3)),  # 512-64-k5 0.264 : 0.400, k11 0.539 : 0.745
        Row(64, 21, Plan((4, 32), 8, 1, 1, band=2, slots=3)),  # 128-64-k21 0.083 : 0.130
    ),
    ("grad_key_value", "three-pass", True): (
        Row(32, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        # 32-64-k5 0.020 : 0.017, k21 0.072 : 0.070, 64-64-k21 0.075 : 0.088
        Row(64, 21, Plan((4, 8), 2, 1, 1, band=4, slots=2), pixels=2**13),
        # 128-16-k5 0.015 : 0.019, k11 0.022 : 0.028, 512-16-k11 0.182 : 0.290
        Row(16, 13, Plan((4, 32), 8, 2, 1)),
        Row(16, 21, Plan((4, 16), 4, 3, 2, band=2, slots=3)),  # 128-16-k21 0.037 : 0.067
        Row(32, 7, Plan((4, 16), 4, 2, 2)),  # 128-32-k5 0.022 : 0.027
        Row(32, 13, Plan((8, 16), 8, 1, 2, band=2, slots=3)),  # 128-32-k11 0.033 : 0.044
        Row(32, 21, Plan((4, 32), 8, 1, 3, band=2, slots=3)),  # 128-32-k21 0.058 : 0.097
        # 128-64-k5, with dQ and delta, 0.0444, where the next row takes 0.0466
        Row(64, 7, Plan((8, 16), 8, 1, 1, band=2, slots=2), pixels=2**15),
        Row(64, 7, Plan((4, 32), 8, 1, 1)),  # 512-64-k5 0.343 : 0.508
        Row(64, 13, Plan((4, 16), 4, 2, 1, band=2, slots=3)),  # 512-64-k11 0.704 : 0.930
        Row(64, 21, Plan((8, 16), 8, 1, 1, band=2, slots=3)),  # 128-64-k21 0.114 : 0.180
    ),
}


# Of the unfused tasks, by what maps are, halves or floats, and whether columns lie side by side. With 16 and 32
# channels by reasoning: tiles that hold weights as well as halos, of as few reads of the L2 cache as leave a
# multiprocessor 8 warps or so.
_TILES_OF_WEIGHTS = {
    ("half", False): (
        Row(16, 5, Plan((8, 8), 8, 3, 2)),
        Row(16, 9, Plan((8, 16), 8, 4, 2, 32)),
        Row(16, 13, Plan((8, 16), 8, 3, 2, 32)),
        Row(16, 21, Plan((8, 16), 8, 1, 2, 32)),
        Row(32, 5, Plan((8, 8), 8, 3, 2)),
        Row(32, 9, Plan((8, 16), 8, 3, 2, 64)),
        Row(32, 13, Plan((8, 16), 8, 2, 2, 64)),
        Row(32, 21, Plan((8, 16), 8, 1, 2, 64)),
    ),
    ("half", True): (
        Row(16, 9, Plan((8, 16), 8, 4, 2)),
        Row(16, 13, Plan((8, 16), 8, 3, 2)),
        Row(16, 21, Plan((8, 16), 8, 1, 2)),
        Row(32, 9, Plan((8, 16), 8, 3, 2)),
        Row(32, 13, Plan((8, 16), 8, 2, 2)),
        Row(32, 21, Plan((8, 16), 8, 1, 2)),
    ),
    ("single", False): (
        Row(16, 5, Plan((8, 8), 8, 2, 1)),
        Row(16, 9, Plan((8, 16), 8, 2, 1, 64)),
        Row(16, 13, Plan((8, 16), 8, 2, 1, 64, band=2, slots=3)),
        Row(16, 21, Plan((8, 8), 4, 1, 1, 64)),
        Row(32, 9, Plan((8, 16), 8, 2, 1)),
        Row(32, 13, Plan((8, 16), 8, 2, 1, band=2, slots=3)),
        Row(32, 21, Plan((4, 8), 2, 2, 1, band=4, slots=3)),
    ),
    ("single", True): (
        Row(16, 9, Plan((8, 16), 8, 2, 1)),
        Row(16, 13, Plan((8, 16), 8, 2, 1, band=2, slots=3)),
        Row(16, 21, Plan((4, 16), 4, 1, 1)),
        Row(32, 9, Plan((8, 16), 8, 2, 1)),
        Row(32, 13, Plan((8, 16), 8, 2, 1, band=2, slots=3)),
        Row(32, 21, Plan((4, 8), 2, 2, 1, band=4, slots=3)),
    ),
}
_GATHERED_WEIGHTS = {
    ("half", False): (
        Row(16, 5, Plan((8, 8), 8, 3, 2)),
        Row(16, 21, Plan((8, 16), 8, 4, 2, 32)),
        Row(32, 5, Plan((8, 8), 8, 3, 2)),
        Row(32, 21, Plan((8, 16), 8, 3, 2, 64)),
    ),
    ("half", True): (
        Row(16, 21, Plan((8, 16), 8, 4, 2)),
        Row(32, 21, Plan((8, 16), 8, 2, 2)),
    ),
    ("single", False): (
        Row(16, 21, Plan((8, 16), 8, 2, 1, 64)),
        Row(32, 13, Plan((8, 16), 8, 2, 1)),
        Row(32, 21, Plan((8, 16), 8, 2, 1, band=2, slots=3)),
    ),
    ("single", True): (
        Row(16, 21, Plan((8, 16), 8, 2, 1)),
        Row(32, 13, Plan((8, 16), 8, 2, 1)),
        Row(32, 21, Plan((8, 16), 8, 2, 1, band=2, slots=3)),
    ),
}
# With 64 channels: the figure is milliseconds at 256x256, exact ones of floats.
_UNFUSED_64 = {
    ("similarity", "half", False): (
        Row(64, 5, Plan((4, 8), 2, 4, 4)),  # 0.011
        Row(64, 9, Plan((8, 16), 4, 3, 2, band=2, slots=2, units=2)),  # 0.015
        Row(64, 21, Plan((4, 16), 8, 2, 6, band=4, slots=2, shared_by=2)),  # 0.045
    ),
    ("similarity", "half", True): (
        Row(64, 5, Plan((8, 16), 8, 2, 2, band=2, slots=2)),  # 0.017
        Row(64, 9, Plan((8, 16), 4, 4, 1, band=2, slots=2, units=2)),  # 0.022
        Row(64, 21, Plan((8, 16), 8, 1, 6, band=4, slots=3, units=2, shared_by=2)),  # 0.057
    ),
    ("similarity", "single", False): (
        Row(64, 5, Plan((4, 16), 4, 3, 1, band=4, slots=2)),  # 0.023
        Row(64, 9, Plan((8, 8), 4, 2, 3, band=4, slots=2)),  # 0.036
        Row(64, 21, Plan((4, 8), 4, 2, 2, band=4, slots=2, shared_by=2)),  # 0.134
    ),
    ("similarity", "single", True): (
        Row(64, 5, Plan((4, 32), 8, 2, 1)),  # 0.028
        Row(64, 9, Plan((4, 32), 4, 2, 2, band=2, slots=2, units=2)),  # 0.039
        Row(64, 21, Plan((4, 8), 4, 2, 2, band=2, slots=2, shared_by=2)),  # 0.155
    ),
    ("aggregate", "half", False): (
        Row(64, 5, Plan((4, 8), 2, 6, 4)),  # 0.010
        Row(64, 9, Plan((8, 16), 4, 4, 2, band=2, slots=2, units=2)),  # 0.016
        Row(64, 21, Plan((4, 16), 4, 2, 6, band=4, slots=2)),  # 0.044
    ),
    ("aggregate", "half", True): (
        Row(64, 5, Plan((4, 32), 4, 4, 2, band=2, slots=2, units=2)),  # 0.015
        Row(64, 9, Plan((8, 16), 4, 4, 2, band=2, slots=2, units=2)),  # 0.021
        Row(64, 21, Plan((4, 32), 8, 1, 4, band=2, slots=2)),  # 0.059
    ),
    ("aggregate", "single", False): (
        Row(64, 5, Plan((4, 8), 2, 6, 2, band=4, slots=2)),  # 0.021
        Row(64, 9, Plan((4, 8), 2, 4, 3, band=4, slots=2)),  # 0.035
        Row(64, 21, Plan((4, 8), 2, 2, 2, band=4, slots=2)),  # 0.134
    ),
    ("aggregate", "single", True): (
        Row(64, 5, Plan((4, 32), 8, 1, 1, band=2, slots=2)),  # 0.027
        Row(64, 9, Plan((4, 32), 4, 1, 2, band=2, slots=2, units=2)),  # 0.044
        Row(64, 21, Plan((4, 8), 2, 2, 2, band=2, slots=2)),  # 0.155
    ),
    ("aggregate_transpose", "half", False): (
        Row(64, 5, Plan((8, 8), 2, 8, 2, units=2)),  # 0.012
        Row(64, 9, Plan((4, 16), 2, 8, 1, band=2, slots=3, units=2)),  # 0.017
        Row(64, 21, Plan((4, 32), 4, 1, 4, band=4, slots=2, units=2)),  # 0.045
    ),
    ("aggregate_transpose", "half", True): (
        Row(64, 5, Plan((4, 32), 4, 4, 1, band=2, slots=2, units=2)),  # 0.017
        Row(64, 9, Plan((4, 32), 4, 4, 1, band=2, slots=2, units=2)),  # 0.022
        Row(64, 21, Plan((4, 32), 8, 2, 1, band=2, slots=2)),  # 0.048
    ),
    ("aggregate_transpose", "single", False): (
        Row(64, 5, Plan((8, 8), 4, 4, 1)),  # 0.022
        Row(64, 9, Plan((8, 8), 4, 3, 2)),  # 0.034
        Row(64, 21, Plan((4, 32), 4, 1, 1, band=2, slots=2, units=2)),  # 0.120
    ),
    ("aggregate_transpose", "single", True): (
        Row(64, 5, Plan((4, 32), 8, 2, 1, band=2, slots=3)),  # 0.028
        Row(64, 9, Plan((4, 32), 4, 3, 1, band=2, slots=2, units=2)),  # 0.040
        Row(64, 21, Plan((4, 32), 4, 2, 2, band=2, slots=2, units=2)),  # 0.123
    ),
}
_TABLE |= {
    (task, product, planes): (*tables[numbers, planes], *_UNFUSED_64[task, numbers, planes])
    for tasks, tables in ((UNFUSED[:2], _TILES_OF_WEIGHTS), (UNFUSED[2:], _GATHERED_WEIGHTS))
    for task in tasks
    for numbers, planes in tables
    for product in (("half",) if numbers == "half" else ("tf32", "three-pass"))
}


def rows() -> list[tuple[str, Form, Row]]:
    """Every row with its task and the form of its maps."""
    return [(task, Form(product, planes), row) for (task, product, planes), table in _TABLE.items() for row in table]


def choose(
    task: str, form: Form, heads: int, depth: int, pixels: int, kernel: tuple[int, int], lead: int, limit: int
) -> Plan | None:
    """The plan of a task; None where it is not served.

    depth: channels per head. pixels: of all images and heads. kernel: (height, width) of the window. lead: columns from
    the first that a kept pixel sees to its own. limit: bytes of shared memory that a block may take.
    """
    rows = _TABLE.get((task, *form), ())
    fitting = (row for row in rows if row.depth == depth and max(kernel) <= row.kernel and pixels <= row.pixels)
    for plan in (row.plan for row in fitting):
        group, held = plan.group(heads, depth, form), shape(task, plan, kernel, lead, form)
        if plan.shared_by > 1 and held.bands == 1:
            continue  # warps would have no bands to take turns at
        if suits(task, plan, group, form) and shared(task, plan, group, depth, kernel, held, form) <= limit:
            return plan
    return None
