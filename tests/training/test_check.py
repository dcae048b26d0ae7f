"""How many weights a recipe trains, as --check counts them."""

import pytest

from sft.errors import RecipeError
from sft.model.load import meta_model
from sft.training import check
from tests.training.sizes import chatglm_6b, recipe_of, small_model


def test_trained_weights_are_peft_s_own_count(tmp_path):
    def count(*overrides: str) -> int:
        recipe = recipe_of("chatglm3_4bit", chatglm_6b(tmp_path), *overrides)
        return check.trained_weights(recipe, meta_model(recipe))

    assert count(r"lora_config.target_modules='.*\.3\.self_attention\.dense'") == 8 * 8192
    assert count("lora_config.target_modules=all-linear") == 14_823_424
    saved = count("lora_config.target_modules=[dense]", "lora_config.modules_to_save=[output_layer]")
    assert saved == 28 * 8 * 8192 + 65024 * 4096
    with pytest.raises(RecipeError, match="lora_config.*not found"):
        count("lora_config.target_modules='.*nothing'")


def test_an_adapter_to_go_on_from_says_itself_how_many_weights_it_has(tmp_path):
    from peft import LoraConfig, get_peft_model

    small_model("qwen").save_pretrained(tmp_path)
    get_peft_model(small_model("qwen"), LoraConfig(r=5, target_modules=["q_proj"])).save_pretrained(tmp_path / "own")
    recipe = recipe_of("qwen_qlora", tmp_path, "lora_config=null", f"adapter_name_or_path={tmp_path / 'own'}")
    assert check.trained_weights(recipe, meta_model(recipe)) == 4 * 5 * (256 + 256)


def test_counting_changes_nothing_in_the_model(tmp_path):
    recipe = recipe_of("chatglm3_4bit", chatglm_6b(tmp_path))
    model = meta_model(recipe)
    names = [name for name, _ in model.named_parameters()]
    check.trained_weights(recipe, model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
