"""How the bundled model was made: tokenizer, network, training, evaluation."""
