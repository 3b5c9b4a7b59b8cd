"""What `LoftConfig` says of itself, and to those who write it as they wrote LoRA's."""

import peft
import pytest
from reference import make_llama

import loft_rs
from loft_rs import Budget, LoftConfig, Pilot


def test_the_repr_is_what_differs_from_the_default():
    assert repr(LoftConfig()) == "LoftConfig()"
    config = LoftConfig(seed=3, target_modules=["v_proj", "q_proj"], r=32, support=Pilot(halves=True))
    assert repr(config) == (
        "LoftConfig(r=32, support=Pilot(steps=32, rank=None, lr=0.001, halves=True, keep=False), "
        "target_modules=['q_proj', 'v_proj'], seed=3)"
    )
    assert eval(repr(config), vars(loft_rs)) == config
    shared = LoftConfig(r=Budget(params=500), support="gradsvd", task_type="CAUSAL_LM")
    assert repr(shared).startswith("LoftConfig(r=Budget(params=500, ") and repr(shared).endswith(
        "task_type='CAUSAL_LM')"
    )


def test_the_repr_leaves_out_what_peft_notes_by_itself(tmp_path):
    model = peft.get_peft_model(make_llama(), LoftConfig(r=4, target_modules=["q_proj"]))
    assert repr(model.peft_config["default"]) == "LoftConfig(r=4, target_modules=['q_proj'])"
    model.save_pretrained(tmp_path)
    loaded = repr(peft.PeftConfig.from_pretrained(str(tmp_path)))
    assert loaded == "LoftConfig(r=4, target_modules=['q_proj'], inference_mode=True, loft_format_version=2)"


@pytest.mark.parametrize(
    ("habit", "answer"),
    [
        ("lora_alpha", "LOFT has no alpha: its scale is 1"),
        ("alpha", "LOFT has no alpha: its scale is 1"),
        ("use_rslora", "LOFT has no alpha: its scale is 1 at every r"),
        ("lora_dropout", "LOFT has no dropout"),
        ("dropout", "LOFT has no dropout"),
        ("rank", r"say r=\.\.\."),
        ("budget", r"say r=loft_rs\.Budget\(params=\.\.\.\)"),
        ("use_dora", r"transform='cayley\+magnitudes'"),
        ("bias", "modules_to_save"),
        ("learning_rate", r"loft_rs\.suggest_lr\(config\)"),
        ("oft_block_size", r"LoftConfig\.oft\(block_size="),
        ("targt_modules", r"did you mean target_modules\?"),
        ("suport", r"did you mean support\?"),
    ],
)
def test_habits_and_slips_are_answered(habit, answer):
    with pytest.raises(TypeError, match=f"LoftConfig has no argument '{habit}'.*{answer}"):
        LoftConfig(**{habit: 1})


def test_what_is_like_nothing_gets_no_guess():
    with pytest.raises(TypeError, match=r"^LoftConfig has no argument 'xyzzy'$"):
        LoftConfig(xyzzy=1)
    with pytest.raises(TypeError, match="LOFT has no alpha"):
        LoftConfig.psoft(32, lora_alpha=16)


def test_one_warning_names_three_layers_and_a_count():
    with pytest.warns(UserWarning, match=r"fits in: model\.layers\.0\S+ \(40 -> 32\), .* and \d+ more$") as caught:
        peft.get_peft_model(make_llama(), LoftConfig(r=40, target_modules="all-linear"))
    (message,) = [str(each.message) for each in caught if "fits in" in str(each.message)]
    assert message.count("->") == 3 and len(message) < 300
