"""Every GGUF type decoded byte by byte, as its format says, and blocks of random codes."""

from __future__ import annotations

import struct
from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

MXFP4_VALUES = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]


def halves(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, "<f2", 1, at)[0])


def plain_4_and_5_bits(block: bytes, kind: Type) -> list[float]:
    """Q4_0, Q4_1, Q5_0, Q5_1: scale, perhaps minimum, perhaps fifth bits, 16 bytes of nibbles."""
    has_minimum, has_fifth = kind in (Type.Q4_1, Type.Q5_1), kind in (Type.Q5_0, Type.Q5_1)
    scale, at = halves(block, 0), 2
    minimum = halves(block, 2) if has_minimum else 0.0
    at += 2 * has_minimum
    fifth = struct.unpack_from("<I", block, at)[0] if has_fifth else 0
    nibbles = block[at + 4 * has_fifth :]
    centre = 0 if has_minimum else 16 if has_fifth else 8
    found = []
    for column in range(32):
        nibble = nibbles[column % 16] >> (4 * (column // 16)) & 15
        found.append((nibble + 16 * (fifth >> column & 1) - centre) * scale + minimum)
    return found


def plain_q8_0(block: bytes, _: Type) -> list[float]:
    return [code * halves(block, 0) for code in struct.unpack_from("32b", block, 2)]


def plain_mxfp4(block: bytes, _: Type) -> list[float]:
    nibbles = [block[1 + c % 16] >> (4 * (c // 16)) & 15 for c in range(32)]
    return [MXFP4_VALUES[nibble] * 2.0 ** (block[0] - 128) for nibble in nibbles]


def plain_q2_k(block: bytes, _: Type) -> list[float]:
    scales, codes, d, minimum = block[:16], block[16:80], halves(block, 80), halves(block, 82)
    found = []
    for column in range(256):
        code = codes[column // 128 * 32 + column % 32] >> (2 * (column % 128 // 32)) & 3
        scale = scales[column // 16]
        found.append(d * (scale & 15) * code - minimum * (scale >> 4))
    return found


def plain_q3_k(block: bytes, _: Type) -> list[float]:
    third, codes, packed, d = block[:32], block[32:96], block[96:108], halves(block, 108)
    found = []
    for column in range(256):
        group, bit = column // 16, column // 32
        low = packed[group] & 15 if group < 8 else packed[group - 8] >> 4
        scale = (low | (packed[8 + group % 4] >> (2 * (group // 4)) & 3) << 4) - 32
        code = codes[column // 128 * 32 + column % 32] >> (2 * (column % 128 // 32)) & 3
        found.append(d * scale * (code - (0 if third[column % 32] >> bit & 1 else 4)))
    return found


def plain_q4_and_q5_k(block: bytes, kind: Type) -> list[float]:
    d, minimum, packed = halves(block, 0), halves(block, 2), block[4:16]
    fifth, codes = (block[16:48], block[48:]) if kind == Type.Q5_K else (bytes(32), block[16:])
    found = []
    for column in range(256):
        group = column // 32
        if group < 4:
            scale, offset = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            offset = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        code = codes[column // 64 * 32 + column % 32] >> (4 * (group % 2)) & 15
        code += 16 * (fifth[column % 32] >> group & 1)
        found.append(d * scale * code - minimum * offset)
    return found


def plain_q6_k(block: bytes, _: Type) -> list[float]:
    low, high, scales, d = block[:128], block[128:192], block[192:208], halves(block, 208)
    found = []
    for column in range(256):
        half, quarter, place = column // 128, column % 128 // 32, column % 32
        code = low[64 * half + 32 * (quarter % 2) + place] >> (4 * (quarter // 2)) & 15
        code |= (high[32 * half + place] >> (2 * quarter) & 3) << 4
        found.append(d * struct.unpack_from("16b", scales)[column // 16] * (code - 32))
    return found


# Decoder, and where the block's float16 numbers lie.
PLAIN: dict[Type, tuple[Callable[[bytes, Type], list[float]], tuple[int, ...]]] = {
    Type.Q4_0: (plain_4_and_5_bits, (0,)),
    Type.Q4_1: (plain_4_and_5_bits, (0, 2)),
    Type.Q5_0: (plain_4_and_5_bits, (0,)),
    Type.Q5_1: (plain_4_and_5_bits, (0, 2)),
    Type.Q8_0: (plain_q8_0, (0,)),
    Type.MXFP4: (plain_mxfp4, ()),
    Type.Q2_K: (plain_q2_k, (80, 82)),
    Type.Q3_K: (plain_q3_k, (108,)),
    Type.Q4_K: (plain_q4_and_q5_k, (0, 2)),
    Type.Q5_K: (plain_q4_and_q5_k, (0, 2)),
    Type.Q6_K: (plain_q6_k, (208,)),
}


def random_blocks(kind: Type, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks [n, bytes] of any codes, whose float16 numbers are those of real weights."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (n_blocks, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in PLAIN[kind][1]:
        scales = generator.normal(0, 0.01, (n_blocks, 1)).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if kind == Type.MXFP4:
        blocks[:, 0] = generator.integers(118, 128, n_blocks)
    return blocks
