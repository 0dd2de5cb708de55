"""Text: tokenizers, chat templates, chats as token ids, and where two tokenizers agree."""
