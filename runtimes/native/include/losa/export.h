// Marks the few names that the shared library shows.
#pragma once
#define LOSA_EXPORT __attribute__((visibility("default")))
