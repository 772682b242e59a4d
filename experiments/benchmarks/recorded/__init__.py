"""The parts of `nested bench offline` and `dynamics`: what they play, tell and draw."""
