# The job `Notify` of flights.py, done by Sidekiq: whichever language is free takes the next one from the queue.
require "sidekiq"

url = { url: ENV.fetch("REDIS_URL") }
Sidekiq.configure_client { |config| config.redis = url }
Sidekiq.configure_server { |config| config.redis = url }

class Notify
  include Sidekiq::Worker

  def perform(id, carrier, dest, minutes)
    sleep 0.01 # as a mail server would take
    Sidekiq.redis { |redis| redis.hset("told by ruby", id, "#{carrier} to #{dest} left #{minutes} minutes late") }
  end
end
