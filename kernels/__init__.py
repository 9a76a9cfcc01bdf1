"""The hot arithmetic, each kernel beside a plain reference; knows neither models nor tasks."""
