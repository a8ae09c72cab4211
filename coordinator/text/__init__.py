"""Text at the edge of the service: tokens from it, text out of tokens. The engine knows token ids only.

tokenizer      text or chat -> token ids
chat_template  messages -> prompt text, in a sandbox
limits         the bounds of that sandbox
sizes          how much text an operation in it would make
detokenizer    token ids -> text, one at a time
decoding       the steps of a tokenizer's decoder, one token at a time
stop_texts     where a text ends a completion
"""
