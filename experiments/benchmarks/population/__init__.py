"""The parts of `nested bench users`: a linear population, and users who each have a CartPole."""
