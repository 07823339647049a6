"""The forecast: its counts are those of the real thing, its data has sources, it obeys physics."""

import json
import re
import struct
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plan as validation
from benchmarks import published
from benchmarks.synthetic import SIZES
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import MODEL_TYPE, FastVLMConfig, VisionConfig
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import CheckpointError, OptionError
from fastvlm_mlx.inspection import inspect_bundle
from fastvlm_mlx.language.model import load_model
from model_export.checkpoint import names
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.encoder import coreml, reference
from model_export.encoder.compression import uniform
from model_export.encoder.fastvithd import FastViTHD, fold
from model_export.encoder.multifunction import export_sizes
from model_export.language import llm, recipes
from model_export.options import ExportOptions
from model_export.options.loaders import LOADERS
from model_export.planning import devices, footprint, plan, roofline
from model_export.planning.devices import CHIPS, DEVICES, SOURCES, find_device
from model_export.quantization.bits.candidates import Space, at_or_below
from model_export.quantization.bits.encoder_sensitivity import calibration_pixels
from model_export.quantization.bits.mixed import mixed
from model_export.samples.calibration import load_calibration

BITS = (*LOADERS["app"].forms["affine"][0], 16)

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
VIEWS = ("view", "reshape", "transpose", "split", "split_with_sizes", "getitem")
ENCODERS = (
    VisionConfig(),
    VisionConfig(image_size=128, layers=(1, 2, 1, 1, 1), embed_dims=(16, 32, 64, 64, 128)),
    VisionConfig(
        image_size=64,
        layers=(1, 1, 2),
        embed_dims=(32, 32, 96),
        mlp_ratios=(2, 4, 3),
        token_mixers=("repmixer", "attention", "attention"),
        pos_embs_shapes=(None, 7, 5),
    ),
)


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Checkpoints of FastVLM's real shapes: headers, and data that takes no room on the disk."""
    found = {}
    for name, size in SIZES.items():
        path = tmp_path_factory.mktemp(name)
        config = {
            "model_type": MODEL_TYPE,
            "mm_vision_tower": "mobileclip_l_1024",
            "hidden_size": size.hidden_size,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "intermediate_size": size.intermediate_size,
            "vocab_size": size.vocab_size,
        }
        (path / "config.json").write_text(json.dumps(config))
        parsed = FastVLMConfig.from_dict(config)
        # 7B's head is read to be compared with its embedding; without one it is tied.
        specs = names.encoder_specs(parsed.vision) + names.llm_specs(parsed, tied=True)
        header: dict[str, Any] = {}
        end = 0
        for spec in specs:
            start, end = end, end + 2 * prod(spec.shape)
            shape = list(spec.shape)
            header[spec.source] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (path / "model.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
        found[name] = Checkpoint(path)
    return found


@pytest.mark.parametrize("vision", ENCODERS, ids=lambda v: str(v.image_size))
def test_operations_are_those_that_torch_counts(vision):
    with torch.device("meta"):
        module = reference.FastViTHD(vision).eval()
        images = torch.zeros(1, 3, vision.image_size, vision.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images)
    assert counter.get_total_flops() == 2 * roofline.encoder_macs(vision).total


def test_operations_of_the_demo_and_of_the_released_encoder(demo_checkpoint):
    vision = Checkpoint(demo_checkpoint).config.vision
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reference.FastViTHD(vision).eval()(torch.zeros(1, 3, 256, 256))
    assert counter.get_total_flops() == 2 * roofline.encoder_macs(vision).total
    macs = roofline.encoder_macs(VisionConfig())
    kinds = [round(count / 1e9, 1) for count in (macs.dense, macs.depthwise, macs.attention)]
    assert kinds == [230.8, 5.7, 6.8]


@pytest.mark.parametrize("vision", ENCODERS, ids=lambda v: str(v.image_size))
def test_activations_are_the_live_tensors_of_the_exported_graph(vision):
    with torch.device("meta"):
        module = FastViTHD(vision).eval()
        images = torch.zeros(1, 3, vision.image_size, vision.image_size)
    with torch.no_grad():
        nodes = list(torch.export.export(module, (images,)).graph.nodes)
    owner, last = {}, {}
    for index, node in enumerate(nodes):
        name = getattr(node.target, "__name__", "").split(".")[0]
        owner[node] = owner[node.args[0]] if name in VIEWS else node
        for used in node.all_input_nodes:
            last[owner[used]] = index
    alive: dict[Any, int] = {}
    peak = 0
    for index, node in enumerate(nodes):
        if owner[node] is node and not node.name.startswith("p_") and node.op != "output":
            alive[node] = node.meta["val"].numel()
        peak = max(peak, sum(alive.values()))
        alive = {held: size for held, size in alive.items() if last[held] > index}
    assert roofline.encoder_live_elements(vision) == peak


def test_the_cache_is_mlx_lm_s(demo_bundle):
    model = load_model(Bundle.open(demo_bundle))
    decoder = footprint.of_bundle(demo_bundle).decoder
    for tokens in (1, 257):
        cache = make_prompt_cache(model.language_model)
        mx.eval(model.language_model(mx.zeros((1, tokens), mx.int32), cache=cache))
        counted = roofline.kv_cache_bytes(decoder, tokens, 2)
        assert counted == sum(layer.nbytes for layer in cache)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_cache_of_the_released_heads(bits):
    decoder = validation.MODELS["Qwen2 0.5B"]
    for tokens in (1, 300, 513):
        cache = KVCache() if bits is None else QuantizedKVCache(bits=bits)
        part = mx.zeros((1, decoder.kv_heads, tokens, decoder.head_dim), mx.float16)
        cache.update_and_fetch(part, part)
        counted = roofline.kv_cache_bytes(decoder, tokens, 2, bits)
        assert counted == decoder.layers * cache.nbytes


@pytest.mark.parametrize("layout", ["app", "mlx"])
def test_weights_are_the_exporter_s(demo_checkpoint, demo_bundle, layout):
    checkpoint = Checkpoint(demo_checkpoint)
    planned = footprint.of_checkpoint(checkpoint, ExportOptions.of(llm_bits=4, layout=layout))
    facts = inspect_bundle(demo_bundle)
    assert planned.llm_bytes == facts["llm"]["bytes"]
    if layout == "mlx":
        return
    real = footprint.of_bundle(demo_bundle)
    assert real.llm_bytes == planned.llm_bytes
    assert real.read_bytes == planned.read_bytes
    assert (real.decoder, real.dtype, real.encoder_format, real.layout) == (
        planned.decoder,
        planned.dtype,
        planned.encoder_format,
        planned.layout,
    )
    assert planned.encoder_bytes == pytest.approx(real.encoder_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # Weights are counted exactly; of the program the text is estimated.
        ({"encoder_precision": "fp32"}, 0.005),
        pytest.param({"encoder_precision": "int8"}, 0.005, marks=pytest.mark.slow),
        ({"encoder_precision": "palette6"}, 0.005),
        *(
            pytest.param(options, 0.01, marks=pytest.mark.slow)
            for options in (
                {"encoder_precision": "mixed", "encoder_bpw": 4.5},
                {"encoder_precision": "palette4", "image_sizes": (256, 128)},
            )
        ),
    ],
    ids=str,
)
def test_an_encoder_is_as_large_as_its_package(demo_checkpoint, tmp_path, options, tolerance):
    checkpoint, wanted = Checkpoint(demo_checkpoint), ExportOptions.of(**options)
    asked = wanted.encoder
    vision = checkpoint.config.vision
    module = fold(checkpoint.encoder_state(), vision)
    compression = coreml.NOT_COMPRESSED
    if asked.precision == "mixed":
        pixels = calibration_pixels(load_calibration(None, vision), vision, "pad")[:4]
        compression = mixed(module, pixels, asked.bits_per_weight)
    elif asked.compressed:
        compression = uniform(module, asked.precision)
    form = coreml.Form(
        precision="fp32" if asked.precision == "fp32" else "fp16",
        metadata=coreml.EncoderMetadata(checkpoint.name, checkpoint.license),
        compression=compression,
        target=asked.target,
    )
    sizes = [vision.image_size, *asked.other_sizes]
    package = tmp_path / "fastvithd.mlpackage"
    configs = [replace(vision, image_size=size) for size in sizes]
    export_sizes(module, configs, package, form)
    written = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    planned = footprint.of_checkpoint(checkpoint, wanted).encoder_bytes
    assert planned == pytest.approx(written, rel=tolerance)


LLM_OPTIONS = [
    *({"llm_bits": bits} for bits in BITS),
    *({"llm_bits": 4, "group_size": group} for group in (32, 128)),
    *({"llm_mode": mode, "layout": "mlx"} for mode in ("mxfp4", "mxfp8", "nvfp4")),
    {"llm_bits": 4, "embed_bits": 8, "projector_bits": 6, "layout": "mlx"},
    {"llm_bits": 4, "embed_bits": 16, "projector_bits": 4},
    {"recipe": "mixed_3_6", "layout": "mlx"},
    {"llm_bits": 4, "dtype": "bfloat16"},
    {"llm_bits": 3, "dtype": "float32", "layout": "mlx"},
]


@pytest.mark.parametrize("given", LLM_OPTIONS, ids=str)
def test_a_language_model_is_as_large_as_its_file(demo_checkpoint, tmp_path, given):
    checkpoint, options = Checkpoint(demo_checkpoint), ExportOptions.of(**given)
    chosen = recipes.scheme(
        checkpoint.llm_specs, checkpoint.config, options.llm, options.destination.layout
    )
    llm.write(
        checkpoint,
        chosen,
        options.destination.layout,
        options.llm.dtype,
        tmp_path,
        lambda done: None,
    )
    data = (tmp_path / "model.safetensors").read_bytes()
    planned = footprint.of_checkpoint(checkpoint, options)
    # The header is no weight; what follows it is counted to the byte.
    expected = len(data) - 8 - struct.unpack("<Q", data[:8])[0]
    in_llm_files = planned.encoder_bytes if options.destination.layout == "mlx" else 0
    assert planned.llm_bytes + in_llm_files == expected


def test_rows_that_an_export_adds_are_counted(edit_checkpoint):
    """A vocabulary that is full gets 64 rows more for `<image>`."""
    from model_export.checkpoint.tokenizer import export_tokenizer

    needed = export_tokenizer(Checkpoint(edit_checkpoint())).image_token_id + 1
    key = "model.embed_tokens.weight"
    path = edit_checkpoint(
        config=lambda config: config.update(vocab_size=needed - 1),
        tensors=lambda state: state.update({key: state[key][: needed - 1]}),
        name="full",
    )
    checkpoint = Checkpoint(path)
    planned = footprint.of_checkpoint(checkpoint, ExportOptions.of(llm_bits=16))
    rows = -(-needed // 64) * 64
    assert planned.config.text.vocab_size == rows
    assert planned.llm_bytes == 2 * (checkpoint.llm_parameters + (rows - needed + 1) * 128)


@pytest.mark.parametrize("layout", ["app", "mlx"])
def test_a_search_takes_no_more_than_is_planned(demo_checkpoint, layout):
    checkpoint = Checkpoint(demo_checkpoint)
    for target in (2.6, 4.5, 40.0):
        options = ExportOptions.of(llm_bpw=target, layout=layout)
        space = Space(checkpoint.llm_specs, checkpoint.config, options)
        made_up = {
            recipes.path_of(spec): {form: 4.0**-form.bits for form in space.near(target)}
            for spec in space.matrices
        }
        sizes = [c.bytes + space.rest for c in at_or_below(space, made_up, target)]
        planned = footprint.of_checkpoint(checkpoint, options).llm_bytes
        assert planned == pytest.approx(max(sizes), rel=0.05 if layout == "app" else 0.01)
        assert planned >= max(sizes)
    with pytest.raises(OptionError, match=r"ask for 2\.55 or more"):
        footprint.of_checkpoint(checkpoint, ExportOptions.of(llm_bpw=2.0, layout=layout))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--preset", "phone"),
        ("--preset", "balanced", "--layout", "mlx"),
        ("--encoder-precision", "mixed", "--encoder-bpw", "5"),
        ("--method", "gptq", "--calibration", "images"),
        ("--deployment-target", "iOS18"),
        ("--image-sizes", "128,256"),
        ("--image-input",),
    ],
    ids=" ".join,
)
def test_options_of_export_are_taken(demo_checkpoint, capsys, monkeypatch, arguments):
    status, out, err = invoke(
        capsys, monkeypatch, str(demo_checkpoint), "--device", "m4", "--json", *arguments
    )
    assert (status, err) == (0, "")
    assert json.loads(out)["devices"][0]["fits"]


def test_every_option_of_export_that_changes_the_bundle_is_one_of_plan():
    from inspect import signature

    from model_export.cli.export import export
    from model_export.cli.plan import plan as verb

    # What is judged by, where it goes and how it is shown change nothing that is forecast.
    others = {"call", "checkpoint", "out", "overwrite", "allow_failed_gates", "as_json"}
    others |= {"min_snr_db", "max_kl_nats", "min_agreement"}
    assert signature(export).parameters.keys() - others <= signature(verb).parameters.keys()


def test_a_hub_id_is_planned(hub, demo_checkpoint, with_hub):
    hub.repositories["acme/demo"] = {
        file.name: file.read_bytes() for file in demo_checkpoint.iterdir() if file.is_file()
    }
    ran = with_hub("-m", "fastvlm_mlx", "plan", "acme/demo", "--device", "m4", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["path"] == "acme/demo"


def test_what_a_token_reads(sized):
    tied = footprint.of_checkpoint(sized["0.5b"], ExportOptions.of(llm_bits=16))
    assert tied.decoder.tied
    # Norms and biases apart, what the roofline's own count says.
    assert tied.read_bytes == pytest.approx(2 * tied.decoder.read_weights, rel=1e-3)
    assert tied.llm_bytes - tied.read_bytes == 2 * (896 * (3072 + 896) + 2 * 896)


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from(sorted(SIZES)),
    device=st.sampled_from(sorted(DEVICES)),
    bits=st.lists(st.sampled_from(BITS), min_size=2, max_size=2, unique=True),
    contexts=st.lists(st.integers(300, 32_768), min_size=2, max_size=2),
    kv_bits=st.sampled_from([None, 8, 4]),
)
def test_more_never_costs_less(sized, size, device, bits, contexts, kv_bits):
    fewer, more = (
        footprint.of_checkpoint(sized[size], ExportOptions.of(llm_bits=n)) for n in sorted(bits)
    )
    short, long = sorted(contexts)
    one = plan.forecast(fewer, device, short, kv_bits)
    wider = plan.forecast(more, device, short, kv_bits)
    longer = plan.forecast(fewer, device, long, kv_bits)
    assert one.memory.total < wider.memory.total
    assert one.memory.total <= longer.memory.total
    assert min(one.tokens_per_s, wider.tokens_per_s, longer.tokens_per_s) > 0
    assert one.tokens_per_s > wider.tokens_per_s
    assert one.tokens_per_s >= longer.tokens_per_s
    assert one.ttft_s == pytest.approx(one.encoder_s + one.project_s + one.prefill_s)
    whole = plan.forecast(fewer, device, short, None)
    assert one.memory.kv_cache <= whole.memory.kv_cache
    assert one.fits or not wider.fits


@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from(sorted(SIZES)),
    device=st.sampled_from([name for name, found in DEVICES.items() if found.memory_gb]),
    bits=st.sampled_from(BITS),
    context=st.integers(600, 32_768),
)
def test_what_is_said_to_make_it_fit_does(sized, size, device, bits, context):
    checkpoint, options = sized[size], ExportOptions.of(llm_bits=bits)
    given_one = footprint.of_checkpoint(checkpoint, options)
    changes = plan.remedies(given_one, device, context, None, plan.exporter(checkpoint, options))
    for change in changes:
        words = dict(zip(change.split()[::2], map(int, change.split()[1::2]), strict=True))
        asked = ExportOptions.of(llm_bits=words.get("--llm-bits", bits))
        made = footprint.of_checkpoint(checkpoint, asked)
        tokens = words.get("--context", context)
        assert plan.forecast(made, device, tokens, words.get("--kv-bits")).fits
    smallest = footprint.of_checkpoint(checkpoint, ExportOptions.of(llm_bits=min(BITS)))
    if not changes:
        assert bits == min(BITS) or not plan.forecast(smallest, device, context, None).fits


def test_the_figures_that_the_page_names(sized):
    shown = re.search(r"needs ([\d,]+) MB in fp16 and ([\d,]+) MB at 4 bits", PAGE)
    for bits, megabytes in zip((16, 4), shown.groups(), strict=True):
        made = footprint.of_checkpoint(sized["0.5b"], ExportOptions.of(llm_bits=bits))
        assert f"{plan.memory(made, 2048, None).total / 1e6:,.0f}" == megabytes


def test_options_of_parts_count(sized):
    def bytes_of(**options: Any) -> int:
        return footprint.of_checkpoint(sized["0.5b"], ExportOptions.of(**options)).llm_bytes

    four = bytes_of(llm_bits=4, layout="mlx")
    assert bytes_of(llm_mode="mxfp4", layout="mlx") < four
    assert bytes_of(llm_bits=4, embed_bits=8, layout="mlx") - four == 151_936 * 896 // 2
    parameters = sized["0.5b"].llm_parameters
    assert bytes_of(llm_bpw=5.5, layout="mlx") == int(5.5 * parameters / 8)
    mode = ExportOptions.of(llm_mode="mxfp8", layout="mlx")
    made = footprint.of_checkpoint(sized["7b"], mode)
    # A mode has no other bits to offer.
    export = plan.exporter(sized["7b"], mode)
    assert plan.remedies(made, "iphone-13", 2048, None, export) == []


def test_fp32_and_mlx_encoders_run_on_the_gpu(sized):
    seconds = {}
    for options in (
        ExportOptions(),
        ExportOptions.of(encoder_precision="fp32"),
        ExportOptions.of(layout="mlx"),
    ):
        made = footprint.of_checkpoint(sized["0.5b"], options)
        found = plan.forecast(made, "iphone-16-pro", 2048, None)
        seconds[options.encoder_format, options.destination.layout] = found.encoder_s
        size = 4 if options.encoder_format == "fp32" else 2
        assert found.memory.encoder_activations == 56_623_104 * size
    assert seconds["fp16", "app"] < seconds["fp32", "app"] == seconds["fp16", "mlx"]


def test_every_figure_has_a_source_and_every_source_a_figure():
    used = {source for chip in CHIPS.values() for source in chip.sources if source}
    used |= {device.source for device in DEVICES.values() if device.source}
    used |= {limit.source for limit in devices.LIMITS.values()} | {"entitlement"}
    assert used == set(SOURCES)
    for chip in CHIPS.values():
        figures = (chip.bandwidth, chip.gpu_tflops, chip.ne_tflops)
        assert [f is None for f in figures] == [s is None for s in chip.sources]
    assert all(device.chip in CHIPS for device in DEVICES.values())
    assert {row.source for row in published.PUBLISHED} == set(published.SOURCES)


def test_the_factors_are_the_fit():
    found = validation.fit([row for row in published.PUBLISHED if row.fitted])
    for field in fields(found):
        fitted = getattr(roofline.FITTED, field.name)
        assert getattr(found, field.name) == pytest.approx(fitted, rel=0.01), field.name


def test_the_page_shows_the_validation():
    (shown,) = re.findall(r"<!-- benchmarks.plan -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert shown.splitlines() == validation.lines()


def test_devices_are_found_however_written():
    assert find_device("iPhone 16 Pro Max") == find_device("iphone-16-pro") == "iphone-16-pro"
    assert find_device("M4 Pro") == "m4-pro"
    with pytest.raises(OptionError, match=r"iphne-16 is not known.*iphone-16"):
        find_device("iphne-16")


def invoke(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["fastvlm", "plan", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_too_large_is_a_report_and_no_failure(sized, capsys, monkeypatch):
    path = str(sized["1.5b"].path)
    arguments = (path, "--device", "iphone-13-mini", "--llm-bits", "16")
    status, out, _ = invoke(capsys, monkeypatch, *arguments)
    assert status == 0
    assert "too large" in out
    assert out.endswith("It fits with --llm-bits 2.\n")
    status, out, _ = invoke(capsys, monkeypatch, *arguments, "--json")
    (found,) = json.loads(out)["devices"]
    assert (status, found["fits"], found["limit_bytes"]) == (0, False, 2_100_000_000)
    assert found["memory_bytes"]["total"] > found["limit_with_entitlement_bytes"]
    assert found["remedies"] == ["--llm-bits 2"]
    seven = str(sized["7b"].path)
    status, out, _ = invoke(capsys, monkeypatch, seven, "--device", "iphone-13-mini")
    assert status == 0
    assert out.endswith("take another device or a smaller model.\n")


def test_without_a_device_all_of_them(demo_bundle, capsys, monkeypatch):
    status, out, _ = invoke(capsys, monkeypatch, str(demo_bundle))
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(DEVICES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--device", "pixel"), "--device pixel is not known"),
        (("--context", "40"), "--context is 40: expected more than an image and a question"),
        (("--context", "4096"), "at most the model's 2,048"),
        (("--kv-bits", "5"), "--kv-bits is 5: expected 4 or 8"),
        (("--kv-bits", "4"), "heads are 32 wide"),
        (("--llm-bits", "7"), "--llm-bits is 7"),
    ],
)
def test_a_mistake_gets_one_sentence(demo_checkpoint, capsys, monkeypatch, arguments, sentence):
    status, out, err = invoke(capsys, monkeypatch, str(demo_checkpoint), *arguments)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_bundle_has_its_bits_already(demo_bundle, tmp_path):
    with pytest.raises(OptionError, match="is a bundle, whose bits and sizes are fixed"):
        plan.run(demo_bundle, None, ExportOptions.of(llm_bits=4))
    with pytest.raises(CheckpointError, match="does not exist"):
        plan.run(tmp_path / "apple" / "FastVLM-0.5B", None, None)


def test_planning_reads_no_weights(sized, monkeypatch):
    monkeypatch.setattr(Checkpoint, "array", lambda *_: pytest.fail("a weight was read"))
    (found,) = plan.run(sized["7b"].path, "iphone-16-pro", ExportOptions.of(llm_bits=4))
    parts = found["memory_bytes"]
    assert parts.pop("total") == sum(parts.values())
    assert set(parts) == {field.name for field in fields(plan.Memory)}
