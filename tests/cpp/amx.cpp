// amx's own code on a machine without AMX: the instructions that it does not know are done by the model (tile_model.h), as a
// signal handler finds them.  Where there is AMX, it runs by itself.
#include <ucontext.h>

#include <csignal>

#include "cpu/dispatch.h"
#include "decode_checks.h"
#include "forward_checks.h"
#include "split_checks.h"

namespace attncore {

extern const IsaTable amx, amx_f32, avx512_bf16;

namespace {

/// Of the numbers in instructions.
constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

std::atomic<long> trapped = 0;

/// An instruction of the form C4, two bytes of VEX, opcode, ModRM.
class TileInstruction {
 public:
  TileInstruction(const unsigned char* code, const greg_t* registers)
      : code_(code),
        registers_(registers),
        mod_(code[4] >> 6U),
        reg_(code[4] >> 3U & 7U),
        rm_(code[4] & 7U) {}

  /// False: none that the model knows.
  bool run() {
    constexpr unsigned kVex = 0xc4, kMap0f38 = 2, kNone = 0, kF3 = 2, kF2 = 3;
    constexpr unsigned kConfigure = 0x49, kMove = 0x4b, kMultiply = 0x5c;
    if (code_[0] != kVex || (code_[1] & 31U) != kMap0f38 || (code_[2] & 0x84U) != 0) return false;
    const unsigned prefix = code_[2] & 3U, opcode = code_[3], vector = ~code_[2] >> 3U & 15U;
    const bool memory = mod_ != 3;
    if (opcode == kConfigure && prefix == kNone && memory && reg_ == 0) {
      configure(reinterpret_cast<const unsigned char*>(address()));
    } else if (opcode == kConfigure && prefix == kNone && !memory && reg_ == 0) {
      tiles.release();
    } else if (opcode == kConfigure && prefix == kF2 && !memory && rm_ == 0) {
      tiles.zero(static_cast<int>(reg_));
    } else if (opcode == kMove && prefix == kF2 && memory && rm_ == 4) {
      const auto* const p = reinterpret_cast<const void*>(address());
      tiles.load(static_cast<int>(reg_), p, stride_);
    } else if (opcode == kMove && prefix == kF3 && memory && rm_ == 4) {
      auto* const p = reinterpret_cast<void*>(address());
      tiles.store(static_cast<int>(reg_), p, stride_);
    } else if (opcode == kMultiply && prefix == kF3 && !memory) {
      tiles.multiply(static_cast<int>(reg_), static_cast<int>(rm_), static_cast<int>(vector));
    } else {
      return false;
    }
    return true;
  }
  [[nodiscard]] Index bytes() const { return bytes_; }

 private:
  [[nodiscard]] greg_t value(unsigned number) const { return registers_[kRegisters[number]]; }

  /// Base + displacement; index · scale is the stride.
  greg_t address() {
    constexpr unsigned kBaseBit = 0x20, kIndexBit = 0x40;  // of VEX, inverted
    const unsigned high_base = (code_[1] & kBaseBit) != 0 ? 0 : 8;
    const unsigned high_index = (code_[1] & kIndexBit) != 0 ? 0 : 8;
    const bool sib = rm_ == 4;
    unsigned base = rm_ | high_base;
    if (sib) {
      const unsigned byte = code_[5], index = (byte >> 3U & 7U) | high_index;
      base = (byte & 7U) | high_base;
      if (index != 4) stride_ = value(index) << (byte >> 6U);
      ++bytes_;
    }
    const bool no_base = mod_ == 0 && (base & 7U) == 5;
    greg_t at = no_base ? 0 : value(base);
    if (mod_ == 1) at += static_cast<signed char>(code_[bytes_++]);
    if (mod_ == 2 || no_base) {
      std::int32_t distance = 0;
      std::memcpy(&distance, code_ + bytes_, sizeof distance);
      at += distance;
      bytes_ += sizeof distance;
    }
    if (no_base && !sib) at += reinterpret_cast<greg_t>(code_) + bytes_;  // from the next instruction
    return at;
  }

  /// Palette 1, eight tiles of up to 16 rows of 64 bytes, and zeros: anything else would fault.
  static void configure(const unsigned char* config) {
    Index rows[8]{};
    for (int i = 0; i < 64; ++i) {
      const bool row_bytes = i >= 16 && i < 32 && i % 2 == 0, is_rows = i >= 48 && i < 56;
      if (is_rows) {
        CHECK(config[i] >= 1 && config[i] <= kTileRows);
        rows[i - 48] = config[i];
      } else {
        CHECK(config[i] == (i == 0 ? 1 : row_bytes ? 64 : 0));
      }
    }
    tiles.configure(rows);
  }

  const unsigned char* code_;
  const greg_t* registers_;
  unsigned mod_, reg_, rm_;
  Index bytes_ = 5, stride_ = 0;
};

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  TileInstruction instruction(reinterpret_cast<const unsigned char*>(registers[REG_RIP]), registers);
  if (!instruction.run()) std::abort();
  registers[REG_RIP] += instruction.bytes();
  ++trapped;
}

}  // namespace
}  // namespace attncore

int main() {
  using namespace attncore;
  if (!avx512_bf16.supported()) {
    std::printf("skipped: this machine has no avx512_bf16\n");
    return 77;
  }
  const bool emulated = !amx.supported();
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  if (emulated) sigaction(SIGILL, &action, nullptr);
  check_forward(*amx.bf16);
  check_decoding(*amx.bf16);
  check_medium(*amx.medium);
  check_split({amx.f16, DType::f16});
  check_split({amx.high, DType::f32, Precision::high});
  check_split({amx_f32.highest, DType::f32});
  CHECK(emulated == (trapped > 0));
  for (const IsaTable* const table : {&amx, &amx_f32}) {
    CHECK(table->preferred == nullptr);  // it is tried
    CHECK(table->supported() == !emulated);
  }
  std::printf("%ld instructions by the model\n", trapped.load());
  return finish();
}
