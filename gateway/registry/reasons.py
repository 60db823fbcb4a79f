"""Why a bundle is turned away before it runs: one stable code and one sentence each. The reference page is made from this."""

from __future__ import annotations

from ..errors import Refused

REASONS: dict[str, str] = {
    "missing_config": "The bundle has no adapter_config.json. Save the adapter with PEFT's save_pretrained.",
    "missing_weights": "The bundle has no adapter_model.safetensors. Save the adapter with save_pretrained(..., safe_serialization=True).",
    "pickle_weights": "Weights in a pickle (.bin, .pt) can run code when read. Save them as safetensors and remove the pickle.",
    "not_a_file": "The source, or a file that would be read, is a link, a directory or a device. Give a real directory of regular files.",
    "too_large": "A file is over its cap. Remove what does not belong to the adapter, or raise the limit in the settings.",
    "bad_config": "The file adapter_config.json is not valid JSON, or a field has a wrong type. Save the adapter with PEFT again.",
    "bad_safetensors": "The file adapter_model.safetensors is cut short, empty or malformed. Save or upload it again.",
    "bad_manifest": "The file manifest.json is malformed. Correct the field it names, or publish without a manifest.",
    "digest_mismatch": "A file differs from the digest recorded for it. Upload the bundle again: that also restores the files of a published version.",
    "peft_type": "Only LoRA adapters are served. Train with LoRA or rsLoRA.",
    "task_type": "Only adapters of causal language models are served. Train with task_type CAUSAL_LM.",
    "rank_too_high": "The rank is above what the engine serves. Train with a lower rank or raise engine.max_lora_rank.",
    "rank_mismatch": "Tensors have another rank than the config says, so the engine would scale them wrongly. Publish the config saved with them.",
    "unknown_module": "A weight belongs to a layer that the base model does not have. Train on this server's base model.",
    "unknown_layer": "A weight belongs to a layer number that the base model does not have. Train on this server's base model.",
    "unknown_tensor": "A tensor is not a LoRA weight. Save only the adapter, with PEFT's save_pretrained.",
    "wrong_shape": "A weight does not fit the base model's layer. Train on this server's base model.",
    "target_mismatch": "The weights do not cover the layers that target_modules lists. Save the whole adapter again.",
    "unpaired": "A layer has lora_A without lora_B, or the reverse. Save the whole adapter again.",
    "dtype": "Weights must be float32, float16 or bfloat16. Convert them before saving.",
    "non_finite": "A weight is NaN or infinite. The training diverged: lower the learning rate and train again.",
    "magnitude": "A weight or the scaling is absurdly large. The training diverged, or the file is damaged: train or upload again.",
    "no_effect": "Every layer's change is exactly zero: the adapter would answer as the base does. Train it, or save the trained weights.",
    "dora": "DoRA adapters are not served. Train with use_dora=False.",
    "base_changing_init": "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights. Convert to plain LoRA: save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...).",
    "modules_to_save": "Whole layers trained beside the adapter (modules_to_save) are not served. Train with LoRA layers only.",
    "embeddings": "Changes to the embeddings or the output head are not served. Leave embed_tokens and lm_head out of the training.",
    "trainable_tokens": "Trained token rows (trainable_token_indices) are not served. Train without them.",
    "lora_bias": "Biases in LoRA layers (lora_bias) are not served. Train with lora_bias=False.",
    "bias": "Trained biases are not served. Train with bias='none'.",
    "alora": "Activated LoRA (aLoRA) is not served. Train without alora_invocation_tokens.",
    "qalora": "QALoRA adapters are not served. Train with use_qalora=False.",
    "bdlora": "Block-diagonal LoRA is not served. Train without use_bdlora.",
    "layer_replication": "Replicated layers are not served. Train without layer_replication.",
    "target_parameters": "LoRA on bare parameters (target_parameters) is not served. Target linear layers.",
    "lora_variant": "This variant of LoRA computes something else than B·A and is not served. Train plain LoRA or rsLoRA.",
    "unknown_field": "The file adapter_config.json has a field of unknown effect. Remove it if it changes nothing at inference.",
    "bad_pattern": "A key of rank_pattern or alpha_pattern is a regular expression. Write out the layers' names.",
    "wrong_base": "The adapter was made for another base model. Train on this server's base model.",
    "wrong_tokenizer": "The adapter was trained with another tokenizer. Train with the base model's own.",
    "wrong_chat_template": "The adapter was trained with another chat template. Train with the base model's own.",
}  # fmt: skip


def refusal(code: str, what: str, *, param: str | None = None) -> Refused:
    """The refusal with this code: what was found, then what to do."""
    return Refused(f"{what}. {REASONS[code]}", code=code, param=param or code)
