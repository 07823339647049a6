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
# Table 4 has others for the same encoder, which agree with no time to the first token.
TABLE_4_MS = {256: 10.1, 512: 33.5, 768: 122.6, 1024: 235.6}
# The same table, of an image cut into tiles: encoder, pixels of the whole → milliseconds.
TILED_MS = {("FastViTHD", 2048): 581.5, ("ViT-L/14", 672): 637.0, ("SigLIP-SO400M", 1152): 2721.4}
# Table 1: at 224 pixels.
ENCODER_MS |= {("FastViTHD", 224): 6.8, ("ViT-L/14", 224): 47.2}
PARAMETERS_M = {"FastViTHD": 125, "ViT-L/14": 304, "ConvNeXt-L": 200}
# Table 6: time to the first token.
TTFT_05B_MS, TTFT_ONEVISION_MS = 166.0, 14_124.0
PREFILL_05B_1024_MS = 50.5
# Tables 4 and 10: 3.2 is what the abstract claims in LLaVA-1.5's setting.
TTFT_TIMES, ONEVISION_TIMES, TOKENS_TIMES = 3.2, 85.0, 16.0
# Table 2: mean of five benchmarks without multi-scale features, and by how they are pooled.
MULTI_SCALE = {"none": 62.6, "average pooling": 62.7, "depthwise convolution": 62.9}
