// What the Cython door needs beside the API: bytes from Python, and the exception in flight in words.
#pragma once

#include <cstddef>
#include <exception>
#include <new>
#include <span>
#include <string>

#include "hash.h"

namespace tokenspeed {

inline std::span<const std::byte> as_bytes(const char* data, std::size_t size) {
  return {reinterpret_cast<const std::byte*>(data), size};
}

// The first 16 bytes at `data`.
inline HashKey hash_key(const char* data) {
  return HashKey::from_bytes(std::span<const std::byte, 16>(reinterpret_cast<const std::byte*>(data), 16));
}

// The 16 bytes of a digest in the order in which they are published.
inline std::string digest(const Hash& hash) {
  return std::string(reinterpret_cast<const char*>(&hash.low), 8) +
         std::string(reinterpret_cast<const char*>(&hash.high), 8);
}

// Both are for a catch block.
inline std::string current_exception_message() {
  try {
    throw;
  } catch (const std::exception& error) {
    return error.what();
  }
}

inline bool current_exception_is_bad_alloc() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace tokenspeed
