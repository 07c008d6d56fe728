"""Networks: tokenizer, encoder, decoder, teachers, heads."""
