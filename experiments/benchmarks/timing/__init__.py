"""What the speed suites measure: workloads, parts, peers, and the machine itself."""
