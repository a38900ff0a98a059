"""Data: files to records, records to ids, ids to batches, in an order that is a function of (seed, epoch)."""

from alignax.data.layouts import bucket, bucket_shape, mismatched, padded, shared_prefix
from alignax.data.ledger import Ledger
from alignax.data.plan import Plan, epoch_order
from alignax.data.records import Record, read_jsonl, record_number, write_jsonl
from alignax.data.stories import generate_corpus, split_prompts, stories_tokenizer
from alignax.data.tasks import prompt_texts, story_records
from alignax.data.tokens import (
    TextPolicy,
    Tokenizer,
    check_vocab,
    load_policy,
    load_tokenizer,
    text_policy,
    train_tokenizer,
    word_tokenizer,
)
from alignax.data.truncate import TRUNCATION, TokenRecord, token_record, tokenize_records

__all__ = ["TRUNCATION", "Ledger", "Plan", "Record", "TextPolicy", "TokenRecord", "Tokenizer", "bucket", "bucket_shape",
           "check_vocab", "epoch_order", "generate_corpus", "load_policy", "load_tokenizer", "mismatched", "padded",
           "prompt_texts", "read_jsonl", "record_number", "shared_prefix", "split_prompts", "stories_tokenizer",
           "story_records", "text_policy", "token_record", "tokenize_records", "train_tokenizer", "word_tokenizer",
           "write_jsonl"]
