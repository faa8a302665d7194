"""Models in the shapes of KubeAI's published catalogue, examples and documentation.

Names and numbers are our own: which fields stand together, how values are written, what clients in
Go and Python send, and what the pods have in consequence.
"""

from __future__ import annotations

from kubeai.api.config.system import SystemConfig

IMAGES = SystemConfig().model_servers
GPU_TOLERATION = {
    "key": "nvidia.com/gpu",
    "operator": "Equal",
    "value": "present",
    "effect": "NoSchedule",
}


def gpus(count, resource="nvidia.com/gpu", **requests):
    amounts = {resource: str(count)}
    return {"limits": amounts, "requests": amounts | requests}


def hub(**variables):
    return {"HF_TOKEN": ("kubeai-huggingface", "token")} | variables


SHAPES = {
    # A small model on CPUs: nothing but what is needed, the features as a flow list.
    "ollama": (
        """
        features: [TextGeneration]
        url: ollama://small:2b
        engine: OLlama
        resourceProfile: cpu:2
        """,
        {
            "image": IMAGES.ollama.images["default"],
            "args": [],
            "env": {"OLLAMA_HOST": "0.0.0.0:8000", "OLLAMA_KEEP_ALIVE": "999999h"},
            "resources": {"requests": {"cpu": "2", "memory": "4Gi"}},
            "startup": ["small:2b", "ollama", "pull", "load"],
        },
    ),
    "ollama-gpu": (
        """
        features: [TextGeneration]
        url: ollama://large:27b
        engine: OLlama
        resourceProfile: nvidia-gpu-l4:1
        minReplicas: 0
        """,
        {
            "image": IMAGES.ollama.images["nvidia-gpu"],
            "resources": gpus(1, cpu="6", memory="24Gi"),
            "tolerations": [GPU_TOLERATION],
            "startup": ["large:27b", "ollama-gpu", "pull", "load"],
        },
    ),
    "ollama-embedding": (
        """
        features: ["TextEmbedding"]
        owner: somebody
        url: "ollama://embed-text"
        engine: OLlama
        resourceProfile: cpu:1
        """,
        {"startup": ["embed-text", "ollama-embedding", "pull", "no-load"]},
    ),
    # The model is part of the image; or it is on a claim, with others.
    "ollama-built-in": (
        """
        features: ["TextGeneration"]
        owner: somebody
        image: registry.example/with-model:1
        url: "ollama://small:0.5b?pull=false"
        engine: OLlama
        resourceProfile: cpu:1
        """,
        {
            "image": "registry.example/with-model:1",
            "startup": ["small:0.5b", "ollama-built-in", "present", "load"],
        },
    ),
    "ollama-claim": (
        """
        url: pvc://model-pvc?model=small:0.5b
        minReplicas: 2
        engine: OLlama
        resourceProfile: "cpu:1"
        features: [TextGeneration]
        """,
        {
            "startup": ["small:0.5b", "ollama-claim", "present", "load"],
            "claim": ("model-pvc", None),
            "count": 2,
        },
    ),
    # vLLM: options with and without values, with underscores, a variable whose value is a number.
    "vllm-cpu": (
        """
        features: [TextGeneration]
        url: hf://org/model-8b
        engine: VLLM
        env:
          VLLM_CPU_KVCACHE_SPACE: "4"
        args:
          - --max-model-len=32768
          - --max-num-batched-token=32768
        resourceProfile: cpu:6
        minReplicas: 0
        """,
        {
            "image": IMAGES.vllm.images["cpu"],
            "args": [
                "org/model-8b",
                "--served-model-name=vllm-cpu",
                "--max-model-len=32768",
                "--max-num-batched-token=32768",
            ],
            "env": hub(VLLM_CPU_KVCACHE_SPACE="4"),
            "resources": {"requests": {"cpu": "6", "memory": "12Gi"}},
        },
    ),
    "vllm-eight-gpus": (
        """
        features: [TextGeneration]
        url: hf://org/model-405b
        engine: VLLM
        env:
          VLLM_ATTENTION_BACKEND: FLASHINFER
        args:
          - --tensor-parallel-size=8
          - --pipeline-parallel-size=1
          - --enable-prefix-caching
          - --enable-chunked-prefill=false
          - --gpu-memory-utilization=0.95
          - --load_format=bitsandbytes
          - --trust-remote-code
        resourceProfile: nvidia-gpu-h100:8
        targetRequests: 500
        """,
        {
            "image": IMAGES.vllm.images["nvidia-gpu"],
            "resources": gpus(8),
            "tolerations": [GPU_TOLERATION],
            "env": hub(VLLM_ATTENTION_BACKEND="FLASHINFER"),
        },
    ),
    "vllm-amd": (
        """
        features: [TextGeneration]
        url: hf://org/model-fp8
        engine: VLLM
        env:
          HIP_FORCE_DEV_KERNARG: "1"
          VLLM_USE_TRITON_FLASH_ATTN: "0"
        args: [--max-seq-len-to-capture=16384]
        resourceProfile: amd-gpu-mi300x:8
        targetRequests: 1024
        """,
        {
            "image": IMAGES.vllm.images["amd-gpu"],
            "resources": gpus(8, "amd.com/gpu"),
            "tolerations": [GPU_TOLERATION | {"key": "amd.com/gpu"}],
            "env": hub(HIP_FORCE_DEV_KERNARG="1", VLLM_USE_TRITON_FLASH_ATTN="0"),
        },
    ),
    "vllm-arm": (
        """
        features: [TextGeneration]
        url: hf://org/model-70b
        engine: VLLM
        args: [--cpu-offload-gb=240, --disable-log-requests]
        resourceProfile: nvidia-gpu-gh200:1
        minReplicas: 1
        maxReplicas: 1
        targetRequests: 200
        """,
        {"image": IMAGES.vllm.images["gh200"], "resources": gpus(1)},
    ),
    "vllm-fixed": (
        """
        features: [TextGeneration]
        url: hf://org/model
        engine: VLLM
        resourceProfile: nvidia-gpu-rtx4070-8gb:1
        minReplicas: 3
        maxReplicas: 3
        scaleDownDelaySeconds: 0
        loadBalancing:
          strategy: PrefixHash
          prefixHash:
            meanLoadFactor: 125
            prefixCharLength: 100
            replication: 256
        """,
        {"image": IMAGES.vllm.images["nvidia-gpu"], "resources": gpus(1), "count": 3},
    ),
    "vllm-claim": (
        """
        features: [TextGeneration]
        url: pvc://model-pvc/org/model
        engine: VLLM
        resourceProfile: cpu:1
        minReplicas: 2
        """,
        {
            "args": ["/model", "--served-model-name=vllm-claim"],
            "claim": ("model-pvc", "org/model"),
            "count": 2,
        },
    ),
    # A bucket without a cache, credentials from the Model's own Secret, a store of one's own.
    "vllm-bucket": (
        """
        features: [TextGeneration]
        owner: somebody
        url: s3://models/org/model-1b
        engine: VLLM
        env:
          AWS_ENDPOINT_URL: http://store:9000
        envFrom:
          - secretRef:
              name: store-keys
        """,
        {
            "args": [
                "s3://models/org/model-1b",
                "--served-model-name=vllm-bucket",
                "--load-format=runai_streamer",
            ],
            "env": {
                "AWS_ACCESS_KEY_ID": ("kubeai-aws", "accessKeyID"),
                "AWS_SECRET_ACCESS_KEY": ("kubeai-aws", "secretAccessKey"),
                "AWS_ENDPOINT_URL": "http://store:9000",
            },
            "envFrom": [{"secretRef": {"name": "store-keys"}}],
            "resources": {},
        },
    ),
    # The model in a container image.
    "vllm-image": (
        """
        features: [TextGeneration]
        url: oci://registry.example:5000/somebody/model-8b:latest
        engine: VLLM
        resourceProfile: nvidia-gpu-l4:1
        """,
        {
            "args": ["/model", "--served-model-name=vllm-image"],
            "claim": ("registry.example:5000/somebody/model-8b:latest", None),
            "resources": gpus(1, cpu="6", memory="24Gi"),
        },
    ),
    # A chat template beside other files, quoted paths, a block of text.
    "vllm-files": (
        """
        features: [TextGeneration]
        url: "hf://org/model-125m"
        engine: VLLM
        resourceProfile: "cpu:1"
        minReplicas: 1
        args:
          - --revision=0123456789abcdef0123456789abcdef01234567
          - --chat-template=/config/chat-template.jinja
        files:
          - path: "/config/chat-template.jinja"
            content: |
              {% for m in messages %}{{ 'Q:\\n' + m['content'] }}{% endfor %}
          - path: /config/prompt.txt
            content: "one line"
        """,
        {
            "files": {
                "_config_chat-template.jinja": "{% for m in messages %}"
                "{{ 'Q:\\n' + m['content'] }}{% endfor %}\n",
                "_config_prompt.txt": "one line",
            },
        },
    ),
    "vllm-embedding": (
        """
        features: [TextEmbedding]
        url: hf://org/embed-7b
        engine: VLLM
        resourceProfile: cpu:1
        args: [--gpu-memory-utilization=0.9]
        """,
        {"image": IMAGES.vllm.images["cpu"]},
    ),
    "infinity-embedding": (
        """
        features: [TextEmbedding]
        url: hf://org/embed-small
        engine: Infinity
        resourceProfile: cpu:1
        minReplicas: 0
        """,
        {
            "image": IMAGES.infinity.images["cpu"],
            "args": ["v2"],
            "env": hub(
                INFINITY_MODEL_ID="org/embed-small",
                INFINITY_SERVED_MODEL_NAME="infinity-embedding",
                INFINITY_URL_PREFIX="/v1",
                INFINITY_ENGINE="torch",
                INFINITY_PORT="8000",
            ),
        },
    ),
    "infinity-reranking": (
        """
        features: [Reranking]
        url: hf://org/rerank-base
        engine: Infinity
        resourceProfile: nvidia-gpu-t4:1
        """,
        {"image": IMAGES.infinity.images["nvidia-gpu"], "resources": gpus(1), "tolerations": []},
    ),
    "speech": (
        """
        features: [SpeechToText]
        owner: Somebody
        url: hf://Org/whisper-medium.en
        engine: FasterWhisper
        resourceProfile: cpu:1
        """,
        {
            "image": IMAGES.faster_whisper.images["default"],
            "args": [],
            "env": hub(
                PRELOAD_MODELS='["Org/whisper-medium.en"]',
                STT_MODEL_TTL="-1",
                WHISPER__TTL="-1",
                ENABLE_UI="false",
                UVICORN_HOST="0.0.0.0",
                UVICORN_PORT="8000",
            ),
        },
    ),
    # The engines that came later, as its documentation shows them.
    "sglang": (
        """
        features: [TextGeneration]
        url: hf://org/model-8b
        engine: SGLang
        args: [--tp-size=2]
        resourceProfile: nvidia-gpu-l4:2
        """,
        {
            "image": IMAGES.sglang.images["nvidia-gpu"],
            "args": [
                "--model-path=org/model-8b",
                "--served-model-name=sglang",
                "--host=0.0.0.0",
                "--port=8000",
                "--tp-size=2",
            ],
            "env": hub(),
            "resources": gpus(2, cpu="12", memory="48Gi"),
        },
    ),
    "llamacpp": (
        """
        features: [TextGeneration]
        url: hf://org/model-GGUF:Q4_K_M
        engine: LlamaCpp
        resourceProfile: cpu:2
        """,
        {
            "image": IMAGES.llama_cpp.images["cpu"],
            "args": [
                *("--host", "0.0.0.0", "--port", "8000", "--alias", "llamacpp", "--metrics"),
                *("-hf", "org/model-GGUF:Q4_K_M"),
            ],
            "env": hub(LLAMA_CACHE="/llama-cache"),
        },
    ),
    "llamacpp-claim": (
        """
        features: [TextEmbedding]
        url: pvc://model-pvc/embed?model=embed-q8_0.gguf
        engine: LlamaCpp
        resourceProfile: cpu:1
        """,
        {
            "args": [
                *("--host", "0.0.0.0", "--port", "8000", "--alias", "llamacpp-claim"),
                *("--metrics", "-m", "/model/embed-q8_0.gguf", "--embedding"),
            ],
            "claim": ("model-pvc", "embed"),
        },
    ),
    # As a client in Go sends it: fields that are not set are null or empty, not absent.
    "from-go": (
        """
        url: hf://org/model
        features: [TextGeneration]
        engine: VLLM
        minReplicas: 0
        targetRequests: null
        scaleDownDelaySeconds: null
        owner: ""
        loadBalancing: {prefixHash: {}}
        resourceProfile: cpu:1
        """,
        {"args": ["org/model", "--served-model-name=from-go"]},
    ),
}
