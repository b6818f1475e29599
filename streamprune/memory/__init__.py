"""What the run itself takes, decided beforehand and watched."""
