"""Everything core ships, by name, on one screen; itself a plugin, registered like any other."""

from trivium.plugin import Plugin
from trivium.registry import Entry

CATALOG = Plugin(
    name="trivium",
    help="what core ships",
    models={
        "llama": Entry("trivium.models.llama:Llama", "trivium.models.config:LlamaConfig", "RMSNorm, RoPE, GQA, SwiGLU"),
        "mistral": Entry(
            "trivium.models.mistral:Mistral", "trivium.models.config:MistralConfig", "Llama with a sliding window"
        ),
        "mixtral": Entry(
            "trivium.models.mixtral:Mixtral", "trivium.models.config:MixtralConfig", "Mistral with experts in layers"
        ),
        "qwen2": Entry(
            "trivium.models.qwen2:Qwen2", "trivium.models.config:Qwen2Config", "Llama with biases (Qwen2, Qwen2.5)"
        ),
        "qwen3": Entry("trivium.models.qwen3:Qwen3", "trivium.models.config:Qwen3Config", "Llama with normed heads"),
        "qwen3_moe": Entry(
            "trivium.models.qwen3_moe:Qwen3Moe", "trivium.models.config:Qwen3MoeConfig", "Qwen3 with experts in layers"
        ),
        "gemma2": Entry(
            "trivium.models.gemma2:Gemma2", "trivium.models.config:Gemma2Config", "capped scores, windows in turn"
        ),
        "hf": Entry("trivium.models.hf:HuggingFace", "trivium.models.config:HFConfig", "any model of transformers"),
        "gpt2": Entry("trivium.models.gpt2:GPT2", "trivium.models.config:GPT2Config", "learned positions, LayerNorm"),
    },
    sources={
        "files": Entry("trivium.data.files:Files", "trivium.data.config:FilesConfig", "your own text, chats and pairs"),
        "mixture": Entry("trivium.data.mixture:Mixture", "trivium.data.config:MixtureConfig", "several domains"),
        "hub": Entry("trivium.data.hub:Hub", "trivium.data.config:HubConfig", "data sets of the Hugging Face hub"),
    },
    objectives={
        "next_token": Entry(
            "trivium.objectives.next_token:NextToken",
            "trivium.objectives.config:NextTokenConfig",
            "cross-entropy on all",
        ),
        "sft": Entry(
            "trivium.objectives.next_token:SFT", "trivium.objectives.config:SFTConfig", "on assistant tokens only"
        ),
        "dpo": Entry(
            "trivium.objectives.preference:Preference",
            "trivium.objectives.config:PreferenceConfig",
            "chosen against rejected, from a reference (DPO, cDPO, robust, SLiC, IPO)",
        ),
        "kto": Entry(
            "trivium.objectives.unpaired:KTO", "trivium.objectives.config:UnpairedConfig", "verdicts without pairs"
        ),
        "reward": Entry(
            "trivium.objectives.reward:Reward", "trivium.objectives.config:RewardConfig", "a score head from pairs"
        ),
        "grpo": Entry(
            "trivium.objectives.policy_gradient:GRPO",
            "trivium.objectives.config:GRPOConfig",
            "policy gradient on groups of its own samples",
        ),
        "distill": Entry(
            "trivium.objectives.distill:Distill",
            "trivium.objectives.config:DistillConfig",
            "a teacher's distribution (forward KL, reverse KL, JSD)",
        ),
    },
    backends={
        "native": Entry(
            "trivium.inference.native.engine:NativeBackend", "trivium.inference.config:NativeConfig", "our own engine"
        ),
        "hf": Entry(
            "trivium.inference.hf:HFBackend", "trivium.inference.config:HFBackendConfig", "transformers' generate"
        ),
        "llamacpp": Entry(
            "trivium.inference.llamacpp:LlamaCppBackend",
            "trivium.inference.config:LlamaCppConfig",
            "llama.cpp over a GGUF file",
        ),
        "encoder": Entry(
            "trivium.inference.encoder:EncoderBackend",
            "trivium.inference.config:EncoderConfig",
            "vectors of texts, from a folder of sentence-transformers",
        ),
        "vllm": Entry(
            "trivium.inference.vllm:VLLMBackend", "trivium.inference.config:VLLMConfig", "vLLM, on GPUs, at scale"
        ),
    },
    extras={
        "adapters": {
            "lora": Entry("trivium.models.adapters:attach", "trivium.models.config:LoraConfig", "W x + B A x"),
            "rslora": Entry(
                "trivium.models.adapters:attach", "trivium.models.config:RsLoraConfig", "LoRA for high ranks"
            ),
            "dora": Entry(
                "trivium.models.adapters:attach", "trivium.models.config:DoraConfig", "LoRA with trained magnitudes"
            ),
            "qlora": Entry(
                "trivium.models.adapters:attach", "trivium.models.config:QLoraConfig", "LoRA on a base of 4 or 8 bits"
            ),
        },
        "tokenizers": {
            "bpe": Entry("trivium.data.tokenizer:train_bpe", "trivium.data.config:BPEConfig", "byte-level BPE"),
            "unigram": Entry(
                "trivium.data.tokenizer:train_unigram",
                "trivium.data.config:UnigramConfig",
                "pieces by their probability, with bytes for the rest",
            ),
        },
        "optimizers": {
            "adamw": Entry("trivium.training.optim:adamw", "trivium.training.config:AdamWConfig", "AdamW"),
            "adamw8bit": Entry(
                "trivium.training.eight_bit:adamw8bit",
                "trivium.training.config:AdamW8bitConfig",
                "AdamW with moments in 8 bits (bitsandbytes)",
            ),
            "paged_adamw8bit": Entry(
                "trivium.training.eight_bit:paged_adamw8bit",
                "trivium.training.config:AdamW8bitConfig",
                "the same, moments in pages that may leave a GPU's memory",
            ),
            "adafactor": Entry(
                "trivium.training.optim:adafactor",
                "trivium.training.config:AdafactorConfig",
                "moments as rows and columns: the least memory",
            ),
            "lion": Entry("trivium.training.lion:lion", "trivium.training.config:LionConfig", "the sign of a momentum"),
            "muon": Entry(
                "trivium.training.muon:muon",
                "trivium.training.config:MuonConfig",
                "orthogonal steps for matrices in blocks, AdamW for all else",
            ),
            "schedule_free": Entry(
                "trivium.training.schedule_free:schedule_free",
                "trivium.training.config:ScheduleFreeConfig",
                "AdamW with an average of the weights in place of a schedule",
            ),
            "sgd": Entry("trivium.training.sgd:sgd", "trivium.training.config:SGDConfig", "momentum, Nesterov's too"),
        },
        "schedules": {
            "cosine": Entry(
                "trivium.training.schedule:cosine", "trivium.training.config:ScheduleConfig", "half a cosine"
            ),
            "linear": Entry(
                "trivium.training.schedule:linear", "trivium.training.config:ScheduleConfig", "a straight line"
            ),
            "constant": Entry(
                "trivium.training.schedule:constant", "trivium.training.config:ConstantConfig", "the peak"
            ),
            "wsd": Entry("trivium.training.schedule:wsd", "trivium.training.config:WSDConfig", "stable, then decay"),
            "inverse_sqrt": Entry(
                "trivium.training.schedule:inverse_sqrt",
                "trivium.training.config:InverseSqrtConfig",
                "one over the root of the step",
            ),
            "cyclic": Entry(
                "trivium.training.schedule:cyclic", "trivium.training.config:CyclicConfig", "cosines with restarts"
            ),
        },
    },
)
