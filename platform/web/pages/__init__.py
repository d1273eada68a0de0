"""The pages for people: rendered here, kept live by one small module of JavaScript."""
