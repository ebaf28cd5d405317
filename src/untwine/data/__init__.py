"""Data sets, and the resumable order in which training reads them."""

from untwine.registry import Registry

DATASETS = Registry(
    "dataset",
    {
        "buckets": "untwine.data.buckets:Buckets",
        "digits": "untwine.data.digits:Digits",
        "emoji": "untwine.data.emoji:Emoji",
        "fashion": "untwine.data.fashion:FashionMNIST",
        "folder": "untwine.data.folder:ImageFolder",
        "hf": "untwine.data.huggingface:HuggingFace",
        "latents": "untwine.data.latents:Latents",
        "shards": "untwine.data.shards:Shards",
    },
)
