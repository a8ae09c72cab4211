import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coordinator.commands.import_gguf import import_gguf as command
from coordinator.gguf_import import import_gguf
from coordinator.gguf_import.importer import RECORD
from protos.errors import InvalidArgument, ModelError
from tests.coordinator.tiny_gguf import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, WIDTH, Model
from tests.smollm2 import SMOLLM2_GGUF, needs_smollm2

EXPERTS = 4


def imported(model: Model, tmp_path: Path, **options: Any) -> Path:
    import_gguf(model.write(tmp_path / "m.gguf"), tmp_path / "out", **options)
    return tmp_path / "out"


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("model", [Model(), Model(tied=False)], ids=["tied", "untied"])
def test_weights_and_logits_equal_transformers_own_reading(model: Model, tmp_path: Path) -> None:
    folder = imported(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    wanted = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name
    ids = torch.arange(40).unsqueeze(0) * 7 % VOCABULARY
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("model", [Model(), Model(experts=EXPERTS)], ids=["dense", "mixtral"])
def test_every_tensor_of_the_checkpoint_is_what_the_model_asks_for(model: Model, tmp_path: Path) -> None:
    folder = imported(model, tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_stacked_experts_become_the_experts_of_mixtral(tmp_path: Path) -> None:
    folder = imported(Model(experts=EXPERTS), tmp_path)
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}

    def stacked(name: str) -> torch.Tensor:
        tensor = tensors[f"blk.1.{name}.weight"]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    gate_up = torch.cat([stacked("ffn_gate_exps"), stacked("ffn_up_exps")], dim=1)  # [experts, 2 * width, hidden]
    assert torch.equal(found["model.layers.1.mlp.experts.gate_up_proj"], gate_up)
    assert torch.equal(found["model.layers.1.mlp.experts.down_proj"], stacked("ffn_down_exps"))
    assert torch.equal(found["model.layers.1.mlp.gate.weight"], stacked("ffn_gate_inp"))


def test_values_equal_the_packages_dequantization(tmp_path: Path) -> None:
    folder = imported(Model(), tmp_path)
    found = load_file(folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for source, target in {"ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}.items():
        tensor = tensors[f"blk.1.{source}.weight"]
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found[f"model.layers.1.{target}.weight"].numpy(), wanted)


def test_biases_of_q_and_k_are_put_in_order_with_their_rows(tmp_path: Path) -> None:
    model = Model(biases=True)
    folder = imported(model, tmp_path)
    found = load_file(folder / "model.safetensors")
    source = model.weights()["blk.0.attn_q.bias"]
    assert source is not None
    wanted = source[0].reshape(HEADS, HEAD_DIM // 2, 2).transpose(0, 2, 1).reshape(-1)
    assert np.array_equal(found["model.layers.0.self_attn.q_proj.bias"].numpy(), wanted)
    assert config(folder)["attention_bias"] is True


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrow_dtypes_are_the_rounded_values(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    import_gguf(Model().write(tmp_path / "m.gguf"), tmp_path / "exact")
    import_gguf(tmp_path / "m.gguf", tmp_path / "narrow", dtype=dtype)
    exact, narrow = load_file(tmp_path / "exact/model.safetensors"), load_file(tmp_path / "narrow/model.safetensors")
    for name, value in exact.items():
        assert torch.equal(narrow[name], value.to(torch_dtype))
    assert config(tmp_path / "narrow")["torch_dtype"] == str(torch_dtype).removeprefix("torch.")


def test_a_large_checkpoint_is_cut_into_files_with_an_index(tmp_path: Path) -> None:
    whole = imported(Model(), tmp_path)
    import_gguf(tmp_path / "m.gguf", tmp_path / "cut", max_file_bytes=60_000)
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(whole).state_dict().items():
        assert torch.equal(ours[name], value)


def test_the_config_says_what_the_metadata_says(tmp_path: Path) -> None:
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": WIDTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    assert wanted.items() <= config(imported(Model(), tmp_path)).items()


def test_the_end_of_turn_token_ends_a_text_too(tmp_path: Path) -> None:
    folder = imported(Model(metadata={"eot": lambda w: w.add_eot_token_id(5)}), tmp_path)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 5]


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    folder = imported(Model(metadata={"window": lambda w: w.add_sliding_window(100)}), tmp_path)
    assert config(folder)["max_position_embeddings"] == 100


def _llama3_divisors(factor: float) -> NDArray[np.float32]:
    """As the converter to GGUF computes them."""
    frequencies = 1.0 / (50000.0 ** (np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM))
    result = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        middle = 1 / ((1 - smooth) / factor + smooth)
        result.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else middle)
    return np.array(result, dtype=np.float32)


SCALINGS = [
    (
        {},
        {"rope_freqs.weight": (_llama3_divisors(32.0), Kind.F32)},
        {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0},
    ),
    ({}, {"rope_freqs.weight": (np.ones(HEAD_DIM // 2, dtype=np.float32), Kind.F32)}, None),
    ({"factor": lambda w: w.add_rope_scaling_factor(4.0)}, {}, {"rope_type": "linear", "factor": 4.0}),
    (
        {
            "type": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "factor": lambda w: w.add_rope_scaling_factor(8.0),
            "original": lambda w: w.add_rope_scaling_orig_ctx_len(32),
        },
        {},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    ),
]


@pytest.mark.parametrize(("metadata", "tensors", "wanted"), SCALINGS, ids=["llama3", "ones", "linear", "yarn"])
def test_rope_scaling_is_said_in_the_words_of_the_hub(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], wanted: dict[str, Any] | None
) -> None:
    folder = imported(Model(metadata=metadata, tensors=tensors), tmp_path)
    found = config(folder)["rope_scaling"]
    assert found == wanted or wanted.items() <= found.items()
    AutoModelForCausalLM.from_pretrained(folder)


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = imported(Model(), tmp_path, progress=lambda done, total: seen.append((done, total)))
    size = sum(value.numel() * 4 for value in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


def test_the_same_file_again_is_left_alone(tmp_path: Path) -> None:
    folder = imported(Model(), tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = import_gguf(tmp_path / "m.gguf", folder)
    assert not again.fresh
    assert again.num_tensors == 2 + 9 * LAYERS
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (imported(Model(), tmp_path) / "config.json").is_file()


def _foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def _other_file(folder: Path) -> None:
    import_gguf(Model(tied=False).write(folder.parent / "other.gguf"), folder)


def _other_dtype(folder: Path) -> None:
    import_gguf(Model().write(folder.parent / "m.gguf"), folder, dtype="bf16")


def _damaged(folder: Path) -> None:
    import_gguf(Model().write(folder.parent / "m.gguf"), folder)
    (folder / "model.safetensors").write_bytes(b"x")


def _broken_record(folder: Path) -> None:
    _foreign(folder)
    (folder / RECORD).write_text('{"made": 1}')


def _a_file(folder: Path) -> None:
    folder.write_text("x")


@pytest.mark.parametrize("prepare", [_foreign, _other_file, _other_dtype, _damaged, _broken_record, _a_file])
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidArgument, match="another folder"):
        imported(Model(), tmp_path)
    assert sorted({*before, tmp_path / "m.gguf"}) == sorted(tmp_path.rglob("*"))


def test_an_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imported(Model(), tmp_path, progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_what_a_killed_import_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in ("import.lock", "model.safetensors"):
        (tmp_path / "out.partial" / name).write_bytes(b"half")
    folder = imported(Model(), tmp_path)
    assert len(load_file(folder / "model.safetensors")) == 2 + 9 * LAYERS
    assert not (tmp_path / "out.partial").exists()


def test_a_foreign_folder_in_the_place_of_the_partial_one_is_left_alone(tmp_path: Path) -> None:
    _foreign(tmp_path / "out.partial")
    with pytest.raises(InvalidArgument, match="in the way"):
        imported(Model(), tmp_path)
    assert (tmp_path / "out.partial/notes.txt").read_text() == "mine"


def test_two_imports_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    refusals = []

    def second(_done: int, _total: int) -> None:
        with pytest.raises(InvalidArgument, match="another import") as caught:
            import_gguf(tmp_path / "m.gguf", tmp_path / "out")
        refusals.append(caught.value)

    imported(Model(), tmp_path, progress=second)
    assert refusals
    assert not import_gguf(tmp_path / "m.gguf", tmp_path / "out").fresh


def _nan(shape: tuple[int, ...]) -> tuple[NDArray[np.float32], Kind]:
    return np.full(shape, np.nan, dtype=np.float32), Kind.F32


REFUSED = [
    (Model(architecture="qwen2"), "architecture 'qwen2' is not supported"),
    (Model(metadata={"heads": lambda w: w.add_head_count([4, 2])}), "differs between layers"),
    (Model(metadata={"kv_heads": lambda w: w.add_head_count_kv(3)}), "3 kv heads do not divide 4 heads"),
    (Model(metadata={"kv_heads": lambda w: w.add_head_count_kv(0)}), "0 kv heads"),
    (Model(metadata={"rope": lambda w: w.add_rope_dimension_count(8)}), "8 rotary dimensions"),
    (Model(metadata={"scale": lambda w: w.add_logit_scale(2.0)}), r"llama\.logit_scale is set"),
    (Model(metadata={"layers": lambda w: w.add_block_count(3)}), r"tensor blk\.2\.attn_norm\.weight is missing"),
    (Model(metadata={"layers": lambda w: w.add_block_count(1)}), r"tensor blk\.1\.\S+ is not part"),
    (Model(metadata={"layers": lambda w: w.add_uint32("llama.block_count", 0)}), "needs layers"),
    (Model(metadata={"layers": lambda _: None}), r"llama\.block_count is missing"),
    (Model(metadata={"layers": lambda w: w.add_string("llama.block_count", "two")}), r"llama\.block_count must be a count"),
    (Model(metadata={"eps": lambda w: w.add_layer_norm_rms_eps(float("nan"))}), "must be a number"),
    (
        Model(metadata={"width": lambda w: w.add_feed_forward_length(128)}),
        r"ffn_gate\.weight must have shape \[128, 64\], found \[96, 64\]",
    ),
    (Model(metadata={"type": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)}), "'longrope' is not supported"),
    (Model(tensors={"rope_freqs.weight": (np.arange(8, dtype=np.float32) + 1, Kind.F32)}), "is not Llama 3's scaling"),
    (Model(tensors={"token_embd.weight": None}), r"token_embd\.weight must be \[vocabulary, 64\], found none"),
    (Model(tensors={"output_norm.weight": _nan((HIDDEN,))}), r"output_norm\.weight has a value that is not finite"),
    (Model(tensors={"blk.0.attn_q_norm.weight": _nan((HEAD_DIM,))}), r"attn_q_norm\.weight is not part of a llama model"),
    (Model(experts=EXPERTS, metadata={"x": lambda w: w.add_expert_weights_scale(2.0)}), "expert_weights_scale is set"),
]


@pytest.mark.parametrize(("model", "wanted"), REFUSED, ids=[wanted for _, wanted in REFUSED])
def test_a_file_that_is_not_supported_is_refused_by_name(tmp_path: Path, model: Model, wanted: str) -> None:
    with pytest.raises(ModelError, match=wanted) as caught:
        imported(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    model = Model(tensors={"output_norm.weight": (np.full(HIDDEN, 1e6, dtype=np.float32), Kind.F32)})
    with pytest.raises(ModelError, match=r"not finite as torch\.float16"):
        imported(model, tmp_path, dtype="f16")


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    file = Model().write(tmp_path / "m.gguf")
    for state in ("imported", "was imported already"):
        result = CliRunner().invoke(command, [str(file), str(tmp_path / "out")], catch_exceptions=False)
        assert result.exit_code == 0
        assert f"{state}: llama, {LAYERS} layers, {2 + 9 * LAYERS} tensors" in result.stdout


def test_the_command_lets_errors_through(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path / "missing.gguf"), str(tmp_path / "out")])
    assert isinstance(result.exception, ModelError)
    assert str(result.exception) == f"{tmp_path / 'missing.gguf'}: cannot be read: No such file or directory"
    # No bar, and no empty line of one, where there is no terminal.
    assert result.stderr == ""


@needs_smollm2
def test_smollm2_equals_transformers_own_reading(tmp_path: Path) -> None:
    source = SMOLLM2_GGUF
    made = import_gguf(source, tmp_path / "smollm2")
    assert (made.layers, made.num_tensors) == (30, 272)
    found = load_file(tmp_path / "smollm2/model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for layer in (0, 13, 29):
        for name, target in {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj", "attn_k": "self_attn.k_proj"}.items():
            tensor = tensors[f"blk.{layer}.{name}.weight"]
            wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
            if name != "ffn_down":
                heads = {"attn_q": 9, "attn_k": 3}[name]
                wanted = wanted.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
            assert np.array_equal(found[f"model.layers.{layer}.{target}.weight"].numpy(), wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    with torch.no_grad():
        first = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(first) == "The"  # capital of France is Paris.
