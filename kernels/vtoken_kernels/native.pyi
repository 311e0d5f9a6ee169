"""The merge step of float32 images on a CPU, compiled from kernels/native; not there where no compiler was.

Addresses are ints (`Tensor.data_ptr`), of float32 but for rows and slot, which are int64 and contiguous. A step is how
many floats lie between the starts of two images, heads or rows; channels lie side by side. `out` and what follows it
are written, contiguous.
"""

#: The vector instructions that plans are made with, "avx512" or "avx2"; "" where there are none, and no plans.
INSTRUCTIONS: str

def sum_heads(
    keys: int, images: int, heads: int, tokens: int, width: int, image_step: int, head_step: int, step: int, out: int, /
) -> None: ...
def tome(
    metric: int,
    images: int,
    tokens: int,
    width: int,
    image_step: int,
    step: int,
    num_prefix: int,
    r: int,
    rows: int,
    slot: int,
    /,
) -> None: ...
def pitome(
    metric: int,
    images: int,
    tokens: int,
    width: int,
    image_step: int,
    step: int,
    num_prefix: int,
    r: int,
    rows: int,
    slot: int,
    pairs: bool,
    margin: float,
    alpha: float,
    /,
) -> None: ...
def merge(
    x: int,
    images: int,
    tokens: int,
    width: int,
    image_step: int,
    step: int,
    r: int,
    rows: int,
    slot: int,
    size: int,
    out: int,
    new_size: int,
    /,
) -> None: ...
