"""Makes digits.npz, the data that is built in: python refiner_min/assets/make_digits.py (needs scikit-learn).

1,797 handwritten digits of 43 people, 8x8 pixels of 0 to 16 (as uint8), with their labels 0 to 9.
Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0; scikit-learn ships its test part, and this is that copy, unchanged.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

if __name__ == "__main__":
    digits = load_digits()
    path = Path(__file__).with_name("digits.npz")
    np.savez_compressed(path, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{len(digits.images)} digits, {path.stat().st_size:,} bytes in {path.name}")
