"""A short table of measured facts: where blocks walk down the map, and by which plans.

What decides: a plan holds as many bands as windows need and leaves groups the registers for their sums; of those, the
fastest at the cases that its row names.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .plan import Form
from .walk import DEPTHS, VECTOR, WalkPlan, room_for

_ARCH = 90  # no other GPU has these products
_ROOMS = {True: DEPTHS, False: (64, 128)}  # for channels of a head, by whether columns lie side by side


class Row(NamedTuple):
    least: int  # the smaller side of the smallest window
    kernel: int  # the larger side of the widest
    plan: WalkPlan
    pixels: int = 1 << 60  # of all images and heads, at most
    above: int = 0  # pixels of all images and heads, more than
    plane: int = 0  # pixels of one image, at least
    padded: bool = False  # of heads alone that have fewer channels than a kernel has room for, which `table` lacks


# Pixels of an image whose planes are 3 MiB; from 2 MiB on, at 64 channels and more, rows of copies take up to half as
# long again. Then plans with fewer of them are faster, for tiles side by side share theirs, and those with more bands
# on their way. At 32 channels such plans are faster at these sizes too.
_LARGE = 3 << 19
_FEW, _SOME = 1 << 15, 1 << 17  # pixels, of which blocks get few tiles

# The first row whose window and sizes match is taken. Figures are milliseconds on an H200, of gradients of key and
# value with delta, by task, whether columns lie side by side and channels per head; then those of the kernel that
# `table` has for these windows, of Triton's where it has none or, behind "of", of the row that would be taken else.
# 512-64-k7 is one map of 512x512 pixels and 64 channels, 8x128-8x64-k7 eight of 128x128 and 8 heads.
_TABLE = {
    ("forward", True, 16): (
        Row(11, 17, WalkPlan((4, 16), 4, 12, 3)),  # 512-4x16-k13 0.198 : 0.220
        Row(15, 21, WalkPlan((4, 16), 2, 12, 4, 2)),  # 512-4x16-k21 0.394 : 0.418
        Row(11, 25, WalkPlan((8, 8), 2, 14, 4, chunk=32)),  # 512-4x16-k25 0.457 : 0.532
        Row(11, 42, WalkPlan((4, 16), 2, 14, 4, chunk=64)),  # 512-4x16-k31 0.545 : 1.265
        Row(11, 57, WalkPlan((8, 8), 2, 10, 3, chunk=64)),  # 512-4x16-k51 1.45 : 1.68
    ),
    ("forward", True, 32): (
        Row(3, 9, WalkPlan((4, 16), 2, 10, 4, 2), pixels=_SOME, padded=True),  # 4x64-6x30-k7 0.0274, k9 0.0296 : 0.0371
        Row(3, 8, WalkPlan((4, 16), 1, 12, 6, 3), padded=True),  # 180x320-6x30-k5 0.056 : 0.077, k7 0.067 : 0.088
        Row(9, 9, WalkPlan((4, 16), 4, 4, 3, 3), plane=_LARGE),  # 2048-32-k9 0.692, of 0.877
        Row(9, 17, WalkPlan((4, 16), 2, 12, 4)),  # 512-4x32-k9 0.188 : 0.220, k13 0.225 : 0.296
        Row(15, 21, WalkPlan((8, 8), 2, 12, 4)),  # 512-2x32-k21 0.231 : 0.375
        Row(11, 25, WalkPlan((8, 8), 2, 14, 4, chunk=32)),  # 512-4x32-k25 0.510 : 0.857
        Row(11, 42, WalkPlan((4, 16), 1, 14, 6, chunk=64)),  # 512-4x32-k31 0.627 : 1.05
        Row(11, 57, WalkPlan((8, 8), 1, 14, 4, chunk=64)),  # 512-4x32-k51 1.60 : 2.60
    ),
    ("forward", True, 64): (
        # 4x64-2x64-k7 0.0144 : 0.0186, 64-64-k7 0.0098 : 0.0143, 128-64-k5 0.0117 : 0.0167, k11 0.0139 : 0.0204
        Row(3, 11, WalkPlan((4, 16), 2, 3, 4, 2), pixels=_FEW),
        Row(3, 5, WalkPlan((4, 16), 2, 5, 4, 2), pixels=2**19),  # 512-64-k3 0.059 : 0.073, k5 0.057 : 0.085
        Row(3, 5, WalkPlan((4, 16), 2, 5, 3, 3)),  # 2048-64-k5 0.873 : 1.229
        Row(3, 9, WalkPlan((4, 16), 2, 5, 3, 3), plane=_LARGE),  # 2048-64-k7 0.906, of 1.06, k9 1.04, of 1.07
        # 8x128-8x64-k7 0.230 : 0.344, k9 0.255 : 0.378, k11 0.281 : 0.461
        Row(3, 11, WalkPlan((4, 16), 2, 5, 4, 2)),
        Row(5, 13, WalkPlan((4, 16), 2, 5, 4, 2), plane=_LARGE),  # 2048-64-k13 1.36, of 1.76
        Row(5, 17, WalkPlan((4, 16), 4, 4, 3)),  # 8x128-8x64-k13 0.312 : 0.461; 512-64-k17 0.095 : 0.159
        Row(15, 21, WalkPlan((8, 8), 2, 9, 4), plane=_LARGE),  # 2048-64-k21 3.69, of 4.23
        Row(15, 21, WalkPlan((8, 8), 4, 5, 3)),  # 512-64-k21 0.165 : 0.216; 128-64-k21 0.0241 : 0.0300
        # 512-64-k25 0.180 : 0.292, k31 0.208 : 0.705, k41 0.334 : 0.800
        Row(11, 42, WalkPlan((4, 16), 1, 11, 4, chunk=64)),
        Row(11, 57, WalkPlan((8, 8), 1, 11, 4, chunk=64)),  # 512-64-k51 0.519 : 0.952
    ),
    ("forward", True, 128): (
        Row(3, 7, WalkPlan((4, 16), 1, 4, 4, 2)),  # 8x128-8x128-k5 0.435 : 0.679, k7 0.546 : 0.747
        Row(5, 9, WalkPlan((4, 16), 1, 4, 4, 2), plane=_LARGE),  # 2048-128-k9 2.66, of 3.51
        # 8x128-8x128-k9 0.611 : 0.817, k13 0.614 : 0.978; 256-4x128-k17 0.189 : 0.291
        Row(5, 17, WalkPlan((4, 16), 2, 5, 3)),
        # 256-4x128-k21 0.267 : 0.580, k25 0.302 : 0.676, k31 0.352 : 0.813
        Row(11, 42, WalkPlan((4, 16), 1, 5, 3, chunk=64)),
        Row(11, 57, WalkPlan((8, 8), 1, 5, 2, chunk=64)),  # 256-4x128-k51 0.958 : 1.71
        Row(11, 127, WalkPlan((4, 16), 2, 5, 3, chunk=32)),  # 256-24x128-k81 11.0 : 18.5
    ),
    ("grad_query", True, 16): (
        Row(23, 25, WalkPlan((8, 8), 2, 14, 4, chunk=32)),  # 512-4x16-k25 0.543 : 0.610
        Row(23, 42, WalkPlan((4, 16), 1, 14, 4, chunk=64)),  # 512-4x16-k31 0.689 : 1.35
    ),
    ("grad_query", True, 32): (
        Row(3, 9, WalkPlan((4, 16), 1, 12, 4, 2), pixels=_SOME, padded=True),  # 4x64-6x30-k7 0.0343, k9 0.0379 : 0.0433
        Row(3, 6, WalkPlan((4, 16), 1, 12, 6, 3), padded=True),  # 180x320-6x30-k5 0.068 : 0.098
        Row(7, 9, WalkPlan((4, 16), 1, 12, 6, 3)),  # 2048-32-k7 0.808 : 0.853; 512-4x32-k9 0.248 : 0.252
        Row(9, 13, WalkPlan((4, 16), 1, 12, 6, 2), plane=_LARGE),  # 2048-32-k13 1.18, of 1.38
        Row(9, 17, WalkPlan((4, 16), 2, 12, 3)),  # 512-4x32-k13 0.301 : 0.375
        Row(15, 21, WalkPlan((8, 8), 2, 12, 3)),  # 512-2x32-k21 0.276 : 0.373
        Row(11, 25, WalkPlan((8, 8), 2, 14, 3, chunk=32)),  # 512-4x32-k25 0.613 : 0.829
        Row(11, 42, WalkPlan((4, 16), 1, 14, 4, chunk=64)),  # 512-4x32-k31 0.784 : 0.996
        Row(11, 57, WalkPlan((8, 8), 1, 14, 3, chunk=64)),  # 512-4x32-k51 2.01 : 2.30
    ),
    ("grad_query", True, 64): (
        Row(3, 9, WalkPlan((4, 16), 2, 5, 3), pixels=_FEW),  # 4x64-2x64-k7 0.0204 : 0.0204; 64-64-k7 0.0098 : 0.0160
        Row(3, 5, WalkPlan((4, 16), 1, 6, 3, 3)),  # 512-64-k3 0.081 : 0.096, 2048-64-k5 1.33 : 1.49
        Row(3, 7, WalkPlan((4, 16), 1, 6, 3, 3), plane=2**20),  # 1024-64-k7 0.358, of 0.365; 2048-64-k7 1.42, of 1.61
        Row(3, 7, WalkPlan((4, 16), 1, 6, 4, 2)),  # 8x128-8x64-k7 0.341, of 0.388
        Row(5, 11, WalkPlan((4, 16), 1, 6, 4, 2), plane=_LARGE),  # 2048-64-k9 1.72, of 2.63, k11 1.90, of 2.62
        # 8x128-8x64-k9 0.406 : 0.474, k11 0.453 : 0.566, k13 0.450 : 0.564; 128-64-k11 0.0175 : 0.0230;
        # 512-64-k17 0.129 : 0.181
        Row(5, 17, WalkPlan((4, 16), 2, 7, 3)),
        Row(15, 21, WalkPlan((8, 8), 2, 8, 3)),  # 512-64-k21 0.196 : 0.273; 128-64-k21 0.0284 : 0.0313
        # 512-64-k25 0.249 : 0.326, k31 0.279 : 0.747, k41 0.454 : 0.834
        Row(11, 42, WalkPlan((4, 16), 1, 9, 3, chunk=64)),
        Row(11, 57, WalkPlan((8, 8), 1, 8, 3, chunk=64)),  # 512-64-k51 0.657 : 0.891
    ),
    ("grad_query", True, 128): (
        Row(3, 7, WalkPlan((4, 16), 1, 7, 2)),  # 8x128-8x128-k5 0.794 : 1.04, k7 0.782 : 1.11
        Row(5, 14, WalkPlan((4, 16), 1, 5, 3)),  # 8x128-8x128-k9 0.836 : 1.20, k13 0.988 : 1.34
        Row(11, 21, WalkPlan((4, 16), 1, 3, 2, chunk=64)),  # 256-4x128-k21 0.419 : 0.647
        # 256-4x128-k25 0.472 : 0.739, k31 0.545 : 0.872
        Row(11, 42, WalkPlan((4, 16), 1, 4, 2, one_by_one=True, chunk=64)),
        Row(11, 57, WalkPlan((8, 8), 1, 4, 2, one_by_one=True, chunk=64)),  # 256-4x128-k51 1.17 : 2.09
        Row(11, 127, WalkPlan((4, 16), 1, 5, 3, chunk=32)),  # 256-24x128-k81 15.6 : 23.2
    ),
    ("grad_key_value", True, 16): (
        Row(26, 42, WalkPlan((4, 16), 1, 14, 3, chunk=64)),  # 512-4x16-k31 0.974 : 1.91
        Row(26, 57, WalkPlan((8, 8), 1, 14, 3, chunk=64)),  # 512-4x16-k51 2.22 : 2.41
    ),
    ("grad_key_value", True, 32): (
        Row(3, 4, WalkPlan((4, 16), 1, 12, 4, 2), padded=True),  # 256-2x24-k3 0.038 : 0.063
        Row(5, 7, WalkPlan((4, 16), 1, 12, 4, 2)),  # 2048-32-k7 1.27 : 1.31; 512-2x32-k5 0.150 : 0.153
        Row(7, 9, WalkPlan((4, 16), 2, 8, 3, 3), plane=_LARGE),  # 2048-32-k9 1.40, of 1.54
        Row(7, 17, WalkPlan((4, 16), 2, 12, 3)),  # 512-4x32-k9 0.347 : 0.407, k13 0.423 : 0.433
        Row(15, 21, WalkPlan((8, 8), 2, 12, 3)),  # 512-2x32-k21 0.408 : 0.785
        Row(11, 25, WalkPlan((8, 8), 2, 10, 3, chunk=32)),  # 512-4x32-k25 0.895 : 1.75
        Row(11, 42, WalkPlan((4, 16), 1, 10, 3, chunk=64)),  # 512-4x32-k31 1.21 : 2.04
        Row(11, 57, WalkPlan((8, 8), 1, 10, 3, chunk=64)),  # 512-4x32-k51 2.76 : 5.11
    ),
    ("grad_key_value", True, 64): (
        Row(3, 9, WalkPlan((4, 16), 2, 5, 2), pixels=_FEW),  # 4x64-2x64-k7 0.0267 : 0.0308
        Row(3, 5, WalkPlan((4, 16), 1, 5, 3, 3)),  # 512-64-k3 0.114 : 0.124, 2048-64-k5 1.82 : 1.93
        Row(3, 7, WalkPlan((4, 16), 1, 7, 3, 3), plane=_LARGE),  # 2048-64-k7 2.02, of 2.96
        Row(5, 9, WalkPlan((4, 16), 2, 4, 2, 2), plane=_LARGE),  # 2048-64-k9 2.47, of 2.96
        # 8x128-8x64-k7 0.520 : 0.621, k9 0.568 : 0.700, k11 0.621 : 0.853, k13 0.671 : 0.855; 64-64-k7 0.0141 : 0.0201,
        # 128-64-k11 0.0221 : 0.0350; 512-64-k17 0.210 : 0.271
        Row(5, 17, WalkPlan((4, 16), 2, 8, 2)),
        Row(17, 21, WalkPlan((8, 8), 1, 12, 3), plane=2**20),  # 1024-64-k21 1.43, of 1.73, 2048-64-k21 6.54, of 8.60
        # 512-64-k19 0.304 : 0.378, k21 0.312 : 0.399, 8x128-8x64-k21 1.30 : 1.59
        Row(17, 21, WalkPlan((8, 8), 2, 9, 2)),
        Row(11, 25, WalkPlan((8, 8), 2, 9, 2, chunk=32)),  # 512-64-k25 0.371 : 0.496
        Row(11, 42, WalkPlan((4, 16), 1, 7, 2, chunk=64), pixels=_FEW),  # 128-64-k31 0.0399 : 0.0756
        Row(11, 42, WalkPlan((4, 16), 1, 9, 3, chunk=64)),  # 512-64-k31 0.475 : 0.865
        Row(11, 57, WalkPlan((8, 8), 2, 9, 2, chunk=32)),  # 512-64-k51 1.04 : 1.41
    ),
    ("grad_key_value", True, 128): (
        # 8x128-8x128-k5 0.979 : 1.55, k7 0.994 : 1.69, k9 1.08 : 1.87, k13 1.41 : 2.20
        Row(3, 13, WalkPlan((4, 16), 1, 8, 2, one_by_one=True)),
        Row(11, 17, WalkPlan((4, 16), 1, 3, 2, chunk=32)),  # 256-4x128-k15 0.405 : 0.592
        # 256-4x128-k21 0.532 : 1.04, k25 0.596 : 1.18, k31 0.715 : 1.40
        Row(11, 42, WalkPlan((4, 16), 1, 3, 2, chunk=64)),
        Row(11, 57, WalkPlan((8, 8), 1, 3, 2, one_by_one=True, chunk=64)),  # 256-4x128-k51 1.68 : 3.92
        Row(11, 127, WalkPlan((4, 16), 2, 4, 2, one_by_one=True, chunk=32)),  # 256-24x128-k81 21.2 : 34.9
    ),
    ("forward", False, 64): (
        # 512-64-k15 0.103 : 0.119, k17 0.106 : 0.119; 8x128-8x64-k15 0.415 : 0.446, k17 0.433 : 0.444
        Row(15, 17, WalkPlan((8, 8), 4, 8, 3), above=_FEW),
        Row(15, 21, WalkPlan((8, 8), 2, 10, 4), above=_FEW),  # 512-64-k19 0.137 : 0.154, k21 0.143 : 0.147
        Row(23, 25, WalkPlan((8, 8), 2, 12, 4, chunk=32), above=_FEW),  # 512-64-k25 0.158 : 0.183
        # 512-64-k31 0.239 : 0.312; 8x128-8x64-k31 0.953 : 1.13
        Row(23, 33, WalkPlan((8, 8), 2, 10, 3, chunk=40), above=_FEW),
        Row(23, 41, WalkPlan((8, 8), 2, 8, 3, chunk=48), above=_FEW),  # 512-64-k41 0.319 : 0.387
        Row(23, 57, WalkPlan((8, 8), 2, 12, 4, chunk=32), above=_FEW),  # 512-64-k51 0.493 : 0.593
    ),
    ("forward", False, 128): (
        Row(3, 9, WalkPlan((8, 8), 8, 3, 2), pixels=_FEW),  # 4x64-2x128-k7 0.0187 : 0.0258, 128-128-k7 0.0133 : 0.0137
        # 8x128-8x128-k3 0.306 : 0.323, k7 0.347 : 0.489, k9 0.351 : 0.525; 2048-128-k7 1.22 : 1.90
        Row(3, 9, WalkPlan((8, 8), 4, 5, 3)),
        # 8x128-8x128-k11 0.529 : 0.555, k13 0.570 : 0.574; 256-4x128-k17 0.166 : 0.205, k21 0.211 : 0.260
        Row(5, 21, WalkPlan((8, 8), 2, 5, 3), above=_FEW),
        Row(11, 25, WalkPlan((8, 8), 2, 5, 3, chunk=32), above=_FEW),  # 256-4x128-k25 0.249 : 0.293
        Row(11, 33, WalkPlan((8, 8), 2, 4, 3, chunk=40), above=_FEW),  # 256-4x128-k31 0.337 : 0.492
        # 256-4x128-k51 0.783 : 1.40; 256-24x128-k81 10.7 : 13.8
        Row(11, 127, WalkPlan((8, 8), 2, 5, 3, chunk=32), above=_FEW),
    ),
    ("grad_query", False, 64): (
        # 512-64-k15 0.133 : 0.161, k17 0.140 : 0.154; 8x128-8x64-k15 0.532 : 0.589, k17 0.562 : 0.575
        Row(15, 17, WalkPlan((8, 8), 2, 10, 3), above=_FEW),
        # 512-64-k19 0.157 : 0.206, k21 0.169 : 0.184; 8x128-8x64-k21 0.671 : 0.703
        Row(15, 21, WalkPlan((8, 8), 2, 7, 3), above=_FEW),
        Row(26, 33, WalkPlan((8, 8), 2, 8, 2, chunk=40), pixels=_FEW),  # 128-64-k31 0.0252 : 0.0361
        Row(26, 33, WalkPlan((8, 8), 2, 7, 3, chunk=40)),  # 512-64-k31 0.273 : 0.321; 8x128-8x64-k31 1.10 : 1.26
    ),
    ("grad_query", False, 128): (
        # 8x128-8x128-k3 0.481 : 0.575, k7 0.491 : 0.726, k9 0.498 : 0.725; 2048-128-k7 1.78 : 2.92, 128-128-k7 0.0158 :
        # 0.0192
        Row(3, 9, WalkPlan((8, 8), 2, 5, 3)),
        # 8x128-8x128-k11 0.686 : 0.778, k13 0.718 : 0.783; 256-4x128-k17 0.220 : 0.268
        Row(5, 17, WalkPlan((8, 8), 2, 3, 3)),
        Row(18, 25, WalkPlan((8, 8), 2, 4, 2, chunk=32)),  # 256-4x128-k21 0.288 : 0.325, k25 0.321 : 0.362
        Row(18, 33, WalkPlan((8, 8), 2, 3, 2, chunk=40)),  # 256-4x128-k31 0.433 : 0.563
        Row(18, 127, WalkPlan((8, 8), 2, 4, 2, chunk=32)),  # 256-4x128-k51 1.02 : 1.14; 256-24x128-k81 14.7 : 16.0
    ),
    ("grad_key_value", False, 128): (
        Row(3, 5, WalkPlan((8, 8), 4, 4, 2)),  # 8x128-8x128-k3 0.544 : 0.839, k5 0.542 : 0.787
        # 8x128-8x128-k7 0.688 : 1.289, k9 0.729 : 1.283; 2048-128-k7 2.62 : 5.05, 128-128-k7 0.0212 : 0.0289
        Row(3, 9, WalkPlan((8, 8), 2, 7, 2)),
        # 8x128-8x128-k11 0.932 : 1.456, k13 0.999 : 1.415; 256-4x128-k17 0.290 : 0.408, 128-128-k13 0.0265 : 0.0319
        Row(5, 17, WalkPlan((8, 8), 2, 6, 2)),
        Row(11, 25, WalkPlan((8, 8), 2, 4, 2, chunk=32)),  # 256-4x128-k21 0.521 : 0.607, k25 0.577 : 0.678
        # 256-4x128-k31 0.807 : 1.16, k51 1.76 : 2.68; 256-24x128-k81 21.8 : 25.4
        Row(11, 127, WalkPlan((8, 8), 2, 6, 2, chunk=24)),
    ),
    ("grad_key_value", False, 64): (
        # 512-64-k9 0.119 : 0.118, k11 0.135 : 0.158, k13 0.140 : 0.156, k15 0.173 : 0.230, k17 0.178 : 0.220,
        # k19 0.209 : 0.296, k21 0.214 : 0.267; 8x128-8x64-k13 0.537 : 0.568, k21 0.820 : 1.014;
        # 128-64-k21 0.0228 : 0.0252
        Row(11, 21, WalkPlan()),
        # 512-64-k25 0.308 : 0.506, k31 0.378 : 0.822; 128-64-k31 0.0338 : 0.0821
        Row(11, 33, WalkPlan((8, 8), 2, 6, 2, chunk=40)),
        Row(11, 41, WalkPlan((8, 8), 2, 7, 2, chunk=48)),  # 512-64-k41 0.525 : 1.08
        Row(11, 57, WalkPlan((8, 8), 2, 11, 2, chunk=32)),  # 512-64-k51 1.02 : 1.70
    ),
}


def table() -> Iterator[tuple[tuple[str, bool, int], tuple[Row, ...]]]:
    """Every task, whether columns lie side by side and channels per head, with their rows."""
    yield from _TABLE.items()


def serves(task: str, form: Form, depth: int, width: int, arch: int) -> bool:
    """Whether such a kernel can take a task over maps of a form, of so many channels per head and columns."""
    room = room_for(depth)
    there = (task, form.planes) in {of[:2] for of in _TABLE} and form.product == "half" and arch == _ARCH
    fits = width % VECTOR == 0 if form.planes else depth == room
    return there and room in _ROOMS[form.planes] and fits


def choose(task: str, planes: bool, depth: int, pixels: int, plane: int, kernel: tuple[int, int]) -> WalkPlan | None:
    """The plan of a task that can be taken; None where blocks are not to walk.

    pixels: of all images and heads. plane: pixels of one image.
    """
    room = room_for(depth)
    rows = (row for row in _TABLE.get((task, planes, room), ()) if row.above < pixels <= row.pixels)
    rows = (row for row in rows if plane >= row.plane and (depth < room or not row.padded))
    return next((row.plan for row in rows if min(kernel) >= row.least and max(kernel) <= row.kernel), None)
