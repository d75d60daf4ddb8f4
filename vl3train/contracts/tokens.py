"""The token names and numbers that data, model and checkpoints agree on."""

IGNORE_INDEX = -100
"""Label of a token on which no loss is taken; torch's own default."""

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
IMAGE_PAD = "<|image_pad|>"
"""Placeholder of one visual token of an image; id 151655 in Qwen2.5's tokenizer."""
VIDEO_PAD = "<|video_pad|>"
"""Placeholder of one visual token of a clip; id 151656 in Qwen2.5's tokenizer."""
IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
STREAM_START = "<|stream_start|>"
STREAM_END = "<|stream_end|>"

UPSTREAM_ADDED_TOKENS = (IMAGE_TAG, STREAM_START, STREAM_END)
"""Tokens that the original training code adds, in its order (train.py:641), so that ids agree with its weights."""

RESERVED_TOKENS = (IM_START, IM_END, END_OF_TEXT, IMAGE_PAD, VIDEO_PAD, STREAM_START, STREAM_END)
"""Texts that no record may contain: they would be read as structure, not as words."""

PATCH_SIZE = 14
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE
"""Values of one patch, 588, in the order channel, row, column."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set id = 'stream' if message['role'] == 'stream' else 'im' -%}"
    "{{- '<|' + id + '_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for content in message['content'] -%}"
    "{%- if content['type'] == 'image' -%}{{- '<|image_pad|>\\n' -}}"
    "{%- elif content['type'] == 'video' -%}{{- '<|video_pad|>\\n' -}}"
    "{%- else -%}{{- content['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|' + id + '_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML without a default system turn, as VideoLLaMA3's weights know it: each visual item is followed by a
newline (original processor.py:38-89; the HF checkpoints' chat_template.jinja renders the same)."""
