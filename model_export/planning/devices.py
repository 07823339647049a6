"""List Apple's chips and phones with their bandwidth, their GPU and Neural Engine rates, and their
memory limits, and say where each figure was published.

Apple publishes the operations of Neural Engines and the bandwidth of some chips; the rest is what
others report. A figure that nobody reports is None, and what depends on it is not predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from fastvlm_mlx.errors import OptionError

GB = 10**9

# Each source has the name of who publishes the figure, what it says, and where.
SOURCES: dict[str, tuple[str, str, str]] = {
    "hollance": (
        "Apple, by hollance/neural-engine",
        "supported-devices.md: trillion operations of every Neural Engine up to the M4 and A18",
        "https://github.com/hollance/neural-engine/blob/master/docs/supported-devices.md",
    ),
    "notebookcheck-a18-memory": (
        "Apple, by Notebookcheck",
        "A18 and A18 Pro: 17 % more memory bandwidth than the one before, whose 51.2 GB/s make 60",
        "https://www.notebookcheck.net/Apple-A18-and-A18-Pro-announced-with-massive-CPU-and-GPU-"
        "performance-gains.886423.0.html",
    ),
    "maderix": (
        "maderix/ANE",
        "#50: the Neural Engine of an M5 Max reaches 19.27 TFLOPS in fp16 and 35.61 TOPS in int8, "
        "the M4's within 4 %: fp16 is half of the published 38, and so of the A17 Pro's 35",
        "https://github.com/maderix/ANE/pull/50",
    ),
    "a19-cores": (
        "nobody",
        "A19 and A19 Pro: 16 cores, no rate published; the A18 Pro's is taken",
        "https://inews.zoombangla.com/a19-pro-vs-a19-specs",
    ),
    "askgeek": (
        "askgeek.io",
        "A16 51.2 GB/s and 1.789 TFLOPS; A15 34.1 and 1.713 (five cores)",
        "https://askgeek.io/es/gpus/vs/Apple_A16-Bionic-vs-Apple_A15-Bionic",
    ),
    "hmc-a15": (
        "HMC-Tech",
        "four cores at the A15's 1,338 MHz: 1.37 TFLOPS",
        "https://hmc-tech.com/gpu/apple-4-core-a16-vs-apple-4-core-a19",
    ),
    "hmc-a17": (
        "HMC-Tech",
        "A17 Pro: six cores at 1,398 MHz, 2.15 TFLOPS",
        "https://hmc-tech.com/gpu/apple-6-core-a17-pro-vs-imagination-img-axe-2-16",
    ),
    "top2gadget": (
        "Top2Gadget",
        "A17 Pro: 51.2 GB/s",
        "https://www.top2gadget.com/apple-a17-pro-vs-a16-bionic/",
    ),
    "hmc-a18": (
        "HMC-Tech",
        "A18: five cores at 1,450 MHz, 1.86 TFLOPS; six, the A18 Pro's, make 2.23",
        "https://hmc-tech.com/gpu/apple-5-core-a18-vs-apple-4-core-a16",
    ),
    "partofstyle": (
        "Part of Style",
        "A19 and A19 Pro: 640 and 768 ALUs at 1,620 MHz",
        "https://partofstyle.com/a19-pro-vs-a19-the-definitive-breakdown-of-slc-cache-gpu-power-"
        "memory-clocks-bandwidth-and-more/",
    ),
    "zoombangla": (
        "inews.zoombangla.com",
        "A19: LPDDR5X-8533, 68.26 GB/s; A19 Pro: -9600, which 64 bits make 76.8 (it prints 75.80)",
        "https://inews.zoombangla.com/a19-pro-vs-a19-specs",
    ),
    "chips-table": (
        "kellyshephard",
        "M1 68.25, M2 and M3 100, M4 120, M5 153 GB/s",
        "https://gist.github.com/kellyshephard",
    ),
    "mljourney": (
        "ML Journey",
        "M1 Pro 200, M1 Max, M2 Max and M3 Max 400 GB/s",
        "https://mljourney.com/?p=4513",
    ),
    "craftrigs": (
        "CraftRigs",
        "M2 Pro 200, M3 Pro 150, M4 Max 546 GB/s",
        "https://craftrigs.pages.dev/comparisons/apple-silicon-llm-benchmarks",
    ),
    "anubis": (
        "Anubis OSS",
        "M1 Ultra 800, M4 Pro 273 GB/s",
        "https://uncsoft.github.io/anubis-oss/analysis.html",
    ),
    "hotmolts": (
        "HotMolts",
        "M2 Ultra 800 GB/s",
        "https://www.hotmolts.com/post/m4-max-isnt-actually-faster-than-m2-ultra-for-loca-5396869d-"
        "2433-43c5-a95c-bfa20e09464b",
    ),
    "eval-apple-models": (
        "eval-apple-models",
        "M5 Max with 40 cores: 614 GB/s",
        "https://eval-apple-models.vercel.app/benchmarks/m5-max-ai-models/dev/",
    ),
    "hub": (
        "Hugging Face",
        "TFLOPS of M1 2.6, M1 Pro 5.2, M1 Max 10.4, M1 Ultra 21, M2 3.6, M2 Max 13.49, M2 Ultra "
        "27.2, M3 Max 14.2",
        "https://github.com/huggingface/huggingface.js/blob/main/packages/tasks/src/hardware.ts",
    ),
    "hub-1044": (
        "Hugging Face",
        "TFLOPS of M2 Pro 6.8, M3 4.1, M3 Pro 7.4, M4 4.6, M4 Pro 9.2, M4 Max 18.4",
        "https://github.com/huggingface/huggingface.js/pull/1044",
    ),
    "hub-m5": (
        "Hugging Face",
        "M5 Max: 22.8 TFLOPS; 10 of its 40 cores, the M5's, make 5.7",
        "https://huggingface.co/hardware/apple-m5-max",
    ),
    "entitlement": (
        "Apple",
        "com.apple.developer.kernel.increased-memory-limit raises the limit; no figure",
        "https://developer.apple.com/documentation/bundleresources/entitlements/com.apple.developer"
        ".kernel.increased-memory-limit",
    ),
    "olmoe": (
        "allenai/OLMoE.swift",
        "#38: an app on an iPhone 12 mini gets 2.1 GB, with the entitlement 2.4",
        "https://github.com/allenai/OLMoE.swift/pull/38",
    ),
    "pocketpal": (
        "a-ghorbani/pocketpal-ai",
        "#651: an app on an iPhone 13 Pro gets 3.12 GB, with the entitlement 4.20",
        "https://github.com/a-ghorbani/pocketpal-ai/pull/651",
    ),
    "rtabmap": (
        "introlab/rtabmap",
        "#1446: an app on an iPhone 15 Pro gets 3 GB, with the entitlement 6",
        "https://github.com/introlab/rtabmap/pull/1446",
    ),
    "whisperkit": (
        "argmaxinc/whisperkit-benchmarks",
        "iPhone.json: chip and memory of the iPhones 14 to 16",
        "https://huggingface.co/spaces/argmaxinc/whisperkit-benchmarks/blob/main/dashboard_data/"
        "iPhone.json",
    ),
    "a3techworld": (
        "a3techworld",
        "iPhone 13: 4 GB and four GPU cores; 13 Pro: 6 GB and five",
        "https://a3techworld.com/apple-a16-chipset-15-faster-cpu-with-new-lpddr5-ram-support/",
    ),
    "itc": (
        "itc.ua",
        "iPhone 17: A19, 8 GB; Air and 17 Pro: A19 Pro with five and six GPU cores, 12 GB",
        "https://itc.ua/news/protsessory-apple-a19-pro-na-150-bystree-predshestvennykov-otlychyya-"
        "chypov-iphone-17-pro-air/",
    ),
}


@dataclass(frozen=True)
class Chip:
    """The peak rates of a chip.

    Attributes:
        bandwidth: the memory's bandwidth in GB/s.
        gpu_tflops: the rate of all `gpu_cores` in fp32 (fp16 is no faster on these GPUs).
        accelerators: whether the GPU's cores have Neural Accelerators, which multiply matrices.
        ne_tflops: the rate of the Neural Engine in fp16.
        sources: keys of `SOURCES` for the bandwidth, the GPU and the Neural Engine, in this order.
    """

    bandwidth: float | None
    gpu_cores: int
    gpu_tflops: float | None
    ne_tflops: float
    sources: tuple[str | None, str | None, str]
    accelerators: bool = False


CHIPS: dict[str, Chip] = {
    "A14": Chip(None, 4, None, 11, (None, None, "hollance")),
    "A15": Chip(34.1, 5, 1.713, 15.8, ("askgeek", "askgeek", "hollance")),
    "A15 (4 cores)": Chip(34.1, 4, 1.37, 15.8, ("askgeek", "hmc-a15", "hollance")),
    "A16": Chip(51.2, 5, 1.789, 17, ("askgeek", "askgeek", "hollance")),
    "A17 Pro": Chip(51.2, 6, 2.15, 17.5, ("top2gadget", "hmc-a17", "maderix")),
    "A18": Chip(60, 5, 1.86, 17.5, ("notebookcheck-a18-memory", "hmc-a18", "maderix")),
    "A18 Pro": Chip(60, 6, 2.23, 17.5, ("notebookcheck-a18-memory", "hmc-a18", "maderix")),
    "A19": Chip(68.26, 5, 2.07, 17.5, ("zoombangla", "partofstyle", "a19-cores"), True),
    "A19 Pro": Chip(76.8, 6, 2.49, 17.5, ("zoombangla", "partofstyle", "a19-cores"), True),
    "M1": Chip(68.25, 8, 2.6, 11, ("chips-table", "hub", "hollance")),
    "M1 Pro": Chip(200, 16, 5.2, 11, ("mljourney", "hub", "hollance")),
    "M1 Max": Chip(400, 32, 10.4, 11, ("mljourney", "hub", "hollance")),
    "M1 Ultra": Chip(800, 64, 21, 22, ("anubis", "hub", "hollance")),
    "M2": Chip(100, 10, 3.6, 15.8, ("chips-table", "hub", "hollance")),
    "M2 Pro": Chip(200, 19, 6.8, 15.8, ("craftrigs", "hub-1044", "hollance")),
    "M2 Max": Chip(400, 38, 13.49, 15.8, ("mljourney", "hub", "hollance")),
    "M2 Ultra": Chip(800, 76, 27.2, 31.6, ("hotmolts", "hub", "hollance")),
    "M3": Chip(100, 10, 4.1, 15.8, ("chips-table", "hub-1044", "hollance")),
    "M3 Pro": Chip(150, 18, 7.4, 15.8, ("craftrigs", "hub-1044", "hollance")),
    "M3 Max": Chip(400, 40, 14.2, 15.8, ("mljourney", "hub", "hollance")),
    "M4": Chip(120, 10, 4.6, 19, ("chips-table", "hub-1044", "maderix")),
    "M4 Pro": Chip(273, 20, 9.2, 19, ("anubis", "hub-1044", "maderix")),
    "M4 Max": Chip(546, 40, 18.4, 19, ("craftrigs", "hub-1044", "maderix")),
    "M5": Chip(153, 10, 5.7, 19, ("chips-table", "hub-m5", "maderix"), True),
    "M5 Max": Chip(614, 40, 22.8, 19, ("eval-apple-models", "hub-m5", "maderix"), True),
}


@dataclass(frozen=True)
class Limit:
    """The bytes that iOS lets an app in the foreground use, without and with the entitlement
    `increased-memory-limit`. Apple publishes no limit, so each is what one app was given on one
    phone.

    Attributes:
        at_least: whether the limits are only lower bounds.
    """

    plain: int
    entitled: int
    source: str
    at_least: bool = False


# The limits by the phone's memory in GB. Nobody reports those of phones with 12 GB.
LIMITS: dict[int, Limit] = {
    4: Limit(int(2.1 * GB), int(2.4 * GB), "olmoe"),
    6: Limit(int(3.12 * GB), int(4.20 * GB), "pocketpal"),
    8: Limit(3 * GB, 6 * GB, "rtabmap"),
    12: Limit(3 * GB, 6 * GB, "rtabmap", at_least=True),
}


@dataclass(frozen=True)
class Device:
    """A phone, or a Mac by its chip.

    Attributes:
        memory_gb: the memory of a phone; None for a Mac, which has no limit for one app.
        source: where a phone's memory and chip are published, a key of `SOURCES`.
    """

    chip: str
    memory_gb: int | None = None
    source: str | None = None

    @property
    def limit(self) -> Limit | None:
        return None if self.memory_gb is None else LIMITS[self.memory_gb]


def _slug(chip: str) -> str:
    return chip.lower().replace(" ", "-")


DEVICES: dict[str, Device] = {
    "iphone-13-mini": Device("A15 (4 cores)", 4, "a3techworld"),
    "iphone-13": Device("A15 (4 cores)", 4, "a3techworld"),
    "iphone-13-pro": Device("A15", 6, "a3techworld"),
    "iphone-14": Device("A15", 6, "whisperkit"),
    "iphone-14-pro": Device("A16", 6, "whisperkit"),
    "iphone-15": Device("A16", 6, "whisperkit"),
    "iphone-15-pro": Device("A17 Pro", 8, "whisperkit"),
    "iphone-16": Device("A18", 8, "whisperkit"),
    "iphone-16-pro": Device("A18 Pro", 8, "whisperkit"),
    "iphone-17": Device("A19", 8, "itc"),
    "iphone-17-pro": Device("A19 Pro", 12, "itc"),
    **{_slug(chip): Device(chip) for chip in CHIPS if chip.startswith("M")},
}


def find_device(name: str) -> str:
    """Find the name in `DEVICES` of a device that a user may write as `iPhone 16 Pro Max` or `M4`.

    Raises:
        OptionError: no such device is known; the error names the nearest.
    """
    slug = _slug(name.strip())
    if slug.startswith("iphone"):
        # The larger phones have the chip and the memory of the smaller ones.
        slug = slug.removesuffix("-max").removesuffix("-plus")
    if slug in DEVICES:
        return slug
    near = ", ".join(get_close_matches(slug, DEVICES, n=3, cutoff=0.3))
    raise OptionError(
        f"--device {name} is not known{f' (nearest: {near})' if near else ''}: leave it out to see "
        "all that are"
    )
