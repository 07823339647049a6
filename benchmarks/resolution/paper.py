"""The paper's figures (arXiv 2412.13303), in milliseconds on an M1 Max.

Its encoders run in fp16 on the Neural Engine, its language models in fp16 on the GPU, and its time
to the first token is the sum of encoding and of prefilling the visual tokens.
"""

from __future__ import annotations

# Table 10: encoder and pixels of a side → milliseconds.
ENCODER_MS = {
    ("FastViTHD", 256): 6.8,
    ("FastViTHD", 768): 54.8,
    ("FastViTHD", 1024): 116.3,
    ("ViT-L/14", 336): 127.4,
    ("SigLIP-SO400M", 384): 272.1,
    ("ConvNeXt-L", 768): 164.3,
    ("ConvNeXt-L", 1024): 696.1,
    ("ConvNeXt-L", 1536): 1569.7,
}
# Table 4 has others for FastViTHD, which contradict Table 10 and agree with no time to the first
# token.
TABLE_4_MS = {256: 10.1, 512: 33.5, 768: 122.6, 1024: 235.6}
# Table 1.
ENCODER_MS["ViT-L/14", 224] = 47.2
# Table 6, with the language model of 0.5B.
TTFT_MS = {("FastViTHD", 1024): 166.0}
# What the abstract claims.
TTFT_TIMES, ONEVISION_TIMES, TOKENS_TIMES = 3.2, 85.0, 16.0
# Table 2: mean of five benchmarks without multi-scale features, and by how they are pooled.
MULTI_SCALE = {"none": 62.6, "average pooling": 62.7, "depthwise convolution": 62.9}
