//! Configurations as they are found in the wild, and as somebody hostile would write them.

use baton_model::{Architecture, ModelConfig, ModelError, RopeScaling};
use proptest::prelude::*;
use serde_json::{Value, json};

fn base() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null,
        "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    })
}

fn with(changes: Value) -> Value {
    let mut config = base();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn parse(config: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(&config.to_string())
}

#[test]
fn a_usual_llama() {
    let config = parse(&base()).unwrap();
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.head_dim, config.kv_heads, config.layers), (64, 4, 22));
    assert_eq!((config.eos_token_ids, config.bos_token_id), (vec![2], Some(1)));
    assert!(!config.qkv_bias && !config.output_bias && !config.mlp_bias && !config.tied_embeddings);
}

#[test]
fn qwen2_has_biases_and_a_window_that_is_switched_off() {
    let config = with(json!({
        "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": false, "sliding_window": 1024,
        "tie_word_embeddings": true, "layer_types": ["full_attention", "full_attention"],
    }));
    let config = parse(&config).unwrap();
    assert_eq!(config.architecture, Architecture::Qwen2);
    assert!(config.qkv_bias && !config.output_bias && config.tied_embeddings);
}

#[test]
fn llama_biases() {
    let config = parse(&with(json!({"attention_bias": true, "mlp_bias": true}))).unwrap();
    assert!(config.qkv_bias && config.output_bias && config.mlp_bias);
}

#[test]
fn old_and_new_spelling_of_rope_mean_the_same() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let old = parse(&with(json!({"rope_theta": 500000.0, "rope_scaling": scaling}))).unwrap();
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(500000.0);
    let new = parse(&with(
        json!({"rope_theta": null, "rope_parameters": parameters, "dtype": "bfloat16"}),
    ))
    .unwrap();
    assert_eq!(old, new);
    assert_eq!(old.rope.theta, 500_000.0);
    assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
    // The oldest spelling of the kind.
    let linear = parse(&with(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}))).unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let plain = parse(&with(
        json!({"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}),
    ))
    .unwrap();
    assert_eq!((plain.rope.theta, plain.rope.scaling), (12345.0, RopeScaling::Plain));
}

#[test]
fn generation_config_names_the_end_tokens() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), base().to_string()).unwrap();
    assert_eq!(ModelConfig::from_dir(dir.path()).unwrap().eos_token_ids, [2]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [5, 7]}"#).unwrap();
    assert_eq!(ModelConfig::from_dir(dir.path()).unwrap().eos_token_ids, [5, 7]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 32000}"#).unwrap();
    let error = ModelConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("generation_config.json") && error.contains("below 32000"),
        "{error}"
    );
}

#[test]
fn what_is_not_computed_is_refused_in_one_sentence_with_cause_and_way_out() {
    let cases = [
        (json!({"architectures": ["MixtralForCausalLM"]}), "MixtralForCausalLM"),
        (json!({"architectures": null, "model_type": "gemma3"}), "gemma3"),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantized (gptq)",
        ),
        (json!({"num_local_experts": 8}), "mixture of experts"),
        (json!({"sliding_window": 1024}), "sliding-window"),
        (
            json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true, "sliding_window": 9}),
            "sliding",
        ),
        (
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "full attention",
        ),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (
            json!({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}),
            "longrope",
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}),
            "mscale",
        ),
    ];
    for (change, cause) in cases {
        let error = parse(&with(change.clone())).expect_err(&change.to_string());
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains(cause) && text.contains("supported") && !text.contains('\n'),
            "{text}"
        );
    }
}

#[test]
fn damaged_fields_are_named() {
    let cases = [
        (json!({"hidden_size": null}), "`hidden_size` is missing"),
        (json!({"hidden_size": 0}), "`hidden_size` must be"),
        (json!({"hidden_size": -5}), "`hidden_size` must be"),
        (json!({"hidden_size": u64::MAX}), "`hidden_size` must be"),
        (json!({"hidden_size": "2048"}), "`hidden_size` must be"),
        (
            json!({"hidden_size": 2047}),
            "must be a multiple of `num_attention_heads`",
        ),
        (
            json!({"num_key_value_heads": 5}),
            "must be a multiple of `num_key_value_heads`",
        ),
        (json!({"num_key_value_heads": 0}), "`num_key_value_heads` must be"),
        (json!({"head_dim": 7}), "must be even"),
        (json!({"vocab_size": 1e30}), "`vocab_size` must be"),
        (json!({"num_hidden_layers": 1_000_000}), "`num_hidden_layers` must be"),
        (json!({"rms_norm_eps": "tiny"}), "`rms_norm_eps` must be"),
        (json!({"rope_theta": 0.0}), "`rope_theta` must be"),
        (json!({"eos_token_id": [1, "two"]}), "`eos_token_id` must be"),
        (json!({"eos_token_id": vec![1; 1000]}), "`eos_token_id` must be"),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 1.0}}),
            "high_freq_factor",
        ),
        (json!({"rope_scaling": {"rope_type": "linear"}}), "`factor` of linear"),
        (json!({"rope_scaling": 8}), "`rope_scaling` must be"),
        (
            json!({"architectures": null, "model_type": null}),
            "neither `architectures` nor `model_type`",
        ),
    ];
    for (change, wanted) in cases {
        let text = parse(&with(change.clone())).expect_err(&change.to_string()).to_string();
        assert!(text.contains(wanted) && text.len() < 400, "{change}: {text}");
    }
    for text in ["", "[]", "{", "null", "\u{0}", &"[".repeat(100_000)] {
        assert!(matches!(ModelConfig::from_json(text), Err(ModelError::Config { .. })));
    }
}

#[test]
fn a_missing_config_says_what_a_model_directory_needs() {
    let dir = tempfile::tempdir().unwrap();
    let text = ModelConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert!(text.contains("config.json") && text.contains("missing"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_value_of_any_field_panics(
        field in prop::sample::select(base().as_object().unwrap().keys().cloned().collect::<Vec<_>>()),
        inner in prop::sample::select(vec!["factor", "rope_type", "low_freq_factor", "beta_fast", "rope_theta"]),
        value in prop_oneof![
            any::<i64>().prop_map(|v| json!(v)), any::<u64>().prop_map(|v| json!(v)),
            any::<f64>().prop_map(|v| json!(v)), any::<bool>().prop_map(|v| json!(v)),
            ".{0,12}".prop_map(|v| json!(v)), prop::collection::vec(any::<i32>(), 0..4).prop_map(|v| json!(v)),
        ],
        nested in any::<bool>(),
        kind in prop::sample::select(vec!["llama3", "linear", "yarn", "default"]),
    ) {
        let change = match nested {
            true => {
                let mut scaling = json!({"rope_type": kind, "factor": 4.0});
                scaling[inner] = value;
                json!({"rope_scaling": scaling})
            }
            false => json!({field: value}),
        };
        if let Ok(config) = parse(&with(change)) {
            prop_assert!(config.kv_geometry(16).is_sane());
            let (frequencies, _) = config.rope.frequencies(config.head_dim);
            prop_assert_eq!(frequencies.len(), config.head_dim / 2);
        }
    }
}
