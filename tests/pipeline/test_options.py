"""The options of an export: each group by itself, the flat names, and the manifest's record."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import OptionError
from model_export.options import (
    FLAT_NAMES,
    DestinationOptions,
    EncoderOptions,
    ExportOptions,
    GateLimits,
    LLMOptions,
)
from model_export.options.export import GROUPS

CHANGED = {
    "llm_bits": 6,
    "group_size": 32,
    "embed_bits": 8,
    "head_bits": 4,
    "projector_bits": 8,
    "recipe": "bits.json",
    "method": "awq",
    "calibration": "images",
    "dtype": "bfloat16",
    "layout": "mlx",
    "overwrite": True,
    "allow_failed_gates": True,
    "image_sizes": (64, 128),
    "min_snr_db": 1.0,
    "max_kl_nats": 2.0,
    "min_agreement": 0.5,
}


def test_every_field_has_one_flat_name():
    found = ["calibration", "preset"]
    for group, names in GROUPS.values():
        found += [names.get(field.name, field.name) for field in fields(group)]
    assert sorted(found) == sorted(FLAT_NAMES)


def test_flat_options_are_the_groups_and_back():
    options = ExportOptions.of(**CHANGED)
    assert options.llm == LLMOptions(
        6, 32, "affine", 8, 4, 8, "bits.json", None, "awq", dtype="bfloat16"
    )
    assert options.encoder == EncoderOptions(image_sizes=(64, 128))
    assert options.limits == GateLimits(1.0, 2.0, 0.5)
    assert options.destination == DestinationOptions("mlx", True, True)
    assert ExportOptions.of(**options.flat()) == options
    assert {name: options.flat()[name] for name in CHANGED} == CHANGED


@pytest.mark.parametrize(
    "given",
    [
        {},
        CHANGED,
        {"llm_bits": 16},
        {"llm_mode": "mxfp8", "layout": "mlx", "embed_bits": 4},
        {"llm_bpw": 4.5, "group_size": 128},
        {"recipe": "mixed_4_6", "layout": "mlx"},
        {"preset": "phone", "encoder_bpw": 5.0},
        {"encoder_precision": "fp32", "image_size": 128},
    ],
    ids=str,
)
def test_a_manifest_s_record_is_the_same_export(given):
    options = ExportOptions.of(**given)
    record = json.loads(json.dumps(options.to_record()))
    again = ExportOptions.from_record(record)
    assert json.loads(json.dumps(again.to_record())) == record
    assert (again.llm.format, again.calibrates) == (options.llm.format, options.calibrates)
    assert ExportOptions.of(**options.flat()).to_record() == options.to_record()
    # Releases to come record more than this one knows, and earlier ones less.
    assert ExportOptions.from_record(record | {"rounding": "up"}) == again
    ExportOptions.from_record({"llm_bits": 4, "layout": "app"})


# By option, what an export may be asked for.
ASKED = {
    "llm_bits": (None, 2, 4, 5, 16),
    "group_size": (None, 32, 128),
    "llm_mode": ("affine", "mxfp4", "mxfp8", "nvfp4"),
    "embed_bits": (None, 4, 16),
    "head_bits": (None, 8, 16),
    "projector_bits": (16, 8),
    "recipe": (None, "mixed_4_6", "recipe.json"),
    "llm_bpw": (None, 4.5),
    "method": ("rtn", "awq", "dwq"),
    "calibration": (None, "images"),
    "dtype": ("float16", "bfloat16", "float32"),
    "encoder_precision": ("fp16", "fp32", "int8", "palette4", "mixed"),
    "encoder_bpw": (None, 5.5),
    "deployment_target": (None, "iOS16", "iOS18"),
    "layout": ("app", "mlx"),
    "allow_failed_gates": (False, True),
    "image_size": (None, 512),
    "image_sizes": ((), (512, 1024)),
    "image_input": (False, True),
    "min_snr_db": (None, 0.0, 50.0),
    "max_kl_nats": (None, 0.25),
    "min_agreement": (None, 1.0),
    "preset": (None, "phone", "exact"),
}


def effect(options):
    """All that an export does by its options."""
    llm, encoder = options.llm, options.encoder
    parts = (llm.embed_bits, llm.head_bits, llm.projector_bits)
    return (
        llm.format if llm.bpw is None else None,
        [bits and llm.part_format(bits) for bits in parts],
        (llm.recipe, llm.recipe and llm.resolved_group_size, llm.bpw, llm.method, llm.dtype),
        (options.encoder_format, encoder.bits_per_weight, encoder.image_input),
        encoder.target if options.destination.layout == "app" else None,
        (encoder.default_size, encoder.other_sizes),
        (options.snr_floor_db, options.limits.max_kl_nats, options.limits.min_agreement),
        (options.destination, options.calibration, options.calibrates, options.preset),
    )


# A few at a time: of many most contradict each other.
few = st.lists(st.sampled_from([(k, v) for k, vs in ASKED.items() for v in vs]), max_size=5)


@settings(max_examples=150, deadline=None)
@given(few.map(dict))
def test_every_record_is_read_back_as_the_same_export(asked):
    try:
        options = ExportOptions.of(**asked)
    except OptionError:
        assume(False)
    record = json.loads(json.dumps(options.to_record(), allow_nan=False))
    again = ExportOptions.from_record(record)
    assert effect(again) == effect(options)
    assert json.loads(json.dumps(again.to_record())) == record


def test_parts_keep_their_group_size_where_the_rest_is_not_quantized():
    options = ExportOptions.of(llm_bits=16, embed_bits=4, group_size=32)
    again = ExportOptions.from_record(options.to_record())
    assert again.llm.part_format(4) == options.llm.part_format(4) == Format(4, 32)


def test_a_recorded_preset_is_not_asked_for_again():
    assert ExportOptions.from_record({"preset": "phone"}).llm.method == "rtn"
    # One that a later release has is no option of this one's.
    assert ExportOptions.from_record({"preset": "watch"}).preset == "watch"


def test_a_mode_brings_its_own_form_when_options_are_replaced():
    options = LLMOptions()
    assert options.format == Format(8, 64)
    assert replace(options, mode="nvfp4").format == Format(4, 16, "nvfp4")
    assert replace(options, mode="nvfp4").part_format(6) == Format(6, 64)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LLMOptions(bits=9), "--llm-bits is 9: expected one of 2, 3, 4, 5, 6, 8, 16"),
        (lambda: LLMOptions(bits="4"), "--llm-bits is '4': expected int | null"),
        (lambda: LLMOptions(mode="mxfp4", bits=8), "--llm-bits is 8 with mxfp4: expected one of 4"),
        (lambda: LLMOptions(group_size=0), "--group-size is 0: expected one of 32, 64, 128"),
        (lambda: LLMOptions(recipe=3), "--recipe is 3: expected str | null"),
        (lambda: EncoderOptions(precision="int4"), "--encoder-precision is int4: expected one of"),
        (lambda: EncoderOptions(precision="mixed", bpw=2), "--encoder-bpw is 2: expected 4 bits"),
        (lambda: GateLimits(min_snr_db=float("nan")), "--min-snr-db is nan: expected a finite num"),
        (lambda: GateLimits(min_snr_db=float("inf")), "--min-snr-db is inf: expected a finite num"),
        (lambda: GateLimits(max_kl_nats=float("inf")), "--max-kl-nats is inf: expected a finite"),
        (lambda: LLMOptions(bpw=float("inf")), "--llm-bpw is inf: expected a finite number"),
        (lambda: GateLimits(max_kl_nats=-0.1), "--max-kl-nats is -0.1: expected zero or more"),
        (lambda: DestinationOptions(layout="gguf"), "--layout is gguf: expected one of app, mlx"),
        (lambda: ExportOptions(llm=4), r"llm is 4: expected LLMOptions, or use ExportOptions\.of"),
        (lambda: ExportOptions(calibration=3), "--calibration is 3: expected str | null"),
        (lambda: ExportOptions.of(bits=4), "bits is no option of an export: expected some of llm_"),
    ],
)
def test_every_group_checks_itself_and_names_the_option(make, sentence):
    with pytest.raises(OptionError, match=f"^{sentence}".replace("|", r"\|")):
        make()


def test_paths_are_taken(tmp_path):
    options = ExportOptions.of(recipe=tmp_path / "a.json", calibration=tmp_path, method="awq")
    assert (options.llm.recipe, options.calibration) == (str(tmp_path / "a.json"), str(tmp_path))
    json.dumps(options.to_record())


def test_the_record_of_a_search_is_read_back():
    searched = ExportOptions.of(llm_bpw=4.5)
    found = ExportOptions.from_record({**searched.to_record(), "llm_bits": 8})
    assert (found.llm.bpw, found.llm.bits, found.calibrates) == (4.5, None, True)
