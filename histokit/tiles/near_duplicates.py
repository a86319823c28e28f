"""Which pictures are copies of each other, flipped, turned, recompressed or brightened ones included.

A picture becomes a signature: the low spatial frequencies of its grey gradient. Two signatures are compared under the 8
symmetries of the square. Arrays in, pairs out; files and labels are the callers' business.
"""

import numpy as np

VERSION = 1
SIDE = 32  # px of a thumbnail
LOW = 16  # frequencies kept per axis
FLAT = 3.0  # grey levels; a thumbnail with less contrast is nearly uniform, and its signature would be noise
# Measured on EBHI-Seg (1,955 tiles) and PCam (170): different tiles reach at most 0.55; copies stay above 0.995 after JPEG
# quality 75, a flip or turn, or brightness x 0.85 to 1.15, above 0.97 at half resolution, and about 0.95 cut 2 px off centre.
THRESHOLD = 0.9
SYMMETRIES = ("same", "flipped", "flipped", "turned", "transposed", "turned", "turned", "transposed")


def thumbnail(image):
    """uint8 [SIDE, SIDE] grey of a PIL image; each pixel is the mean over its area, so symmetries survive."""
    from PIL import Image

    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def signatures(thumbnails):
    """float32 [N, LOW, LOW] of unit norm from uint8 [N, SIDE, SIDE]; zero where a thumbnail is nearly uniform.

    The cosine transform, weighted by frequency: the product of two signatures is the correlation of the blurred
    pictures' gradients (Parseval). Brightness and contrast drop out; broad shading, which many different tiles share,
    counts little.
    """
    from scipy.fft import dctn

    thumbnails = np.asarray(thumbnails)
    result = np.zeros((len(thumbnails), LOW, LOW), np.float32)
    steps = np.arange(LOW, dtype=np.float32)
    weight = np.hypot(steps[:, None], steps)
    for start in range(0, len(thumbnails), 4096):
        part = thumbnails[start : start + 4096].astype(np.float32)
        waves = dctn(part, axes=(1, 2), norm="ortho")[:, :LOW, :LOW] * weight
        norm = np.linalg.norm(waves, axis=(1, 2), keepdims=True)
        textured = (part.std(axis=(1, 2)) >= FLAT) & (norm[:, 0, 0] > 0)
        result[start : start + 4096][textured] = waves[textured] / norm[textured]
    return result


def symmetric(waves):
    """[N, 8, LOW, LOW]: signatures of the 8 flips and turns. A flip changes the sign of odd waves, a transposition swaps the axes."""
    sign = (-1.0) ** np.arange(waves.shape[-1], dtype=np.float32)
    both = (waves, waves.swapaxes(-1, -2))
    return np.stack([w * v * h for w in both for v in (1, sign[:, None]) for h in (1, sign)], axis=-3).astype(np.float32)


def invariant(waves):
    """[N, LOW * LOW], equal for all 8 symmetries of a picture; its dot product is never below that of the best symmetry.

    Signs that a flip can change are dropped and (i, j), (j, i) are sorted. Both steps bring no two points further apart than
    their nearest symmetric versions are, and the norm stays 1: so one matrix product finds every candidate, where 8 would.
    """
    even = np.arange(waves.shape[-1]) % 2 == 0
    kept = np.where(even[:, None] & even, waves, np.abs(waves))
    upper = np.triu_indices(waves.shape[-1])
    one, other = kept[:, upper[0], upper[1]], kept[:, upper[1], upper[0]]
    low = np.minimum(one, other)[:, upper[0] != upper[1]]
    return np.concatenate([np.maximum(one, other), low], axis=1).astype(np.float32)


def pairs(waves, others=None, threshold=THRESHOLD, block=0):
    """All pairs of copies.

    Args:
        waves: signatures [N, LOW, LOW].
        others: signatures [M, LOW, LOW] to look among; None looks among `waves` themselves, each pair once (i < j).
        threshold: correlation from which two pictures count as copies.
        block: rows compared at a time; 0 takes what a matrix of 256 MB holds, at most 2048.

    Returns:
        i, j int64 [P], correlation float32 [P] in [threshold, 1], symmetry int64 [P] (index into SYMMETRIES).
    """
    alone = others is None
    others = waves if alone else others
    block = block or max(64, min(2048, 2**26 // max(1, len(others))))
    left, right = invariant(waves), invariant(others).T
    found = []
    for start in range(0, len(waves), block):
        begin = start if alone else 0
        near = left[start : start + block] @ right[:, begin:]  # [block, M]
        i, j = np.nonzero(near >= threshold - 1e-4)
        i, j = i + start, j + begin
        if alone:
            i, j = i[i < j], j[i < j]
        for k in range(0, len(i), 4096):  # the candidates, under each symmetry
            a, b = i[k : k + 4096], j[k : k + 4096]
            match = np.einsum("phw,pshw->ps", waves[a], symmetric(others[b]))
            best = match.argmax(axis=1)
            value = match[np.arange(len(a)), best]
            keep = value >= threshold
            found.append((a[keep], b[keep], value[keep], best[keep]))
    if not found:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32), np.zeros(0, int)
    i, j, value, best = (np.concatenate(column) for column in zip(*found, strict=True))
    return i, j, np.minimum(value, 1).astype(np.float32), best
