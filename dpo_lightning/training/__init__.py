"""What Lightning drives: the module, its optimizer, strategy, logging and callbacks."""
